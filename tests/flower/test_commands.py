# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What `fedlpp-hf server` and `fedlpp-hf client` start, and what they refuse before that."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

from fedlpp_hf.cli.main import main
from fedlpp_hf.flower.client_command import run_client
from fedlpp_hf.flower.installed_app import APP_FILES
from fedlpp_hf.flower.loading import read_settings
from fedlpp_hf.flower.server_command import run_server


RECIPE = Path(__file__).parents[2] / "recipes" / "flower"


def test_client_app_is_light():
    """It is a new process in every message: what is imported there is paid for there."""
    heavy = "{'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys, fedlpp_hf.flower.client_app, fedlpp_hf.flower.server_app; assert not {heavy}, {heavy}",
        ],
        check=True,
    )


def test_insecure_is_for_loopback(tmp_path, rows, write_config):
    config = str(write_config())
    with pytest.raises(ValueError, match="only loopback"):
        run_server(config, state_dir=str(tmp_path), listen="0.0.0.0", insecure=True)
    with pytest.raises(ValueError, match="only loopback"):
        run_client(config, str(rows / "site-0.jsonl"), server="192.0.2.1:8000", insecure=True)


def test_client_without_certificate_makes_its_key(tmp_path, rows, write_config, capsys):
    config = str(write_config())
    with pytest.raises(ValueError, match=r"expected the ca\.crt"):
        run_client(config, str(rows / "site-0.jsonl"), state_dir=str(tmp_path / "state"))
    assert (tmp_path / "state" / "node.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    told = capsys.readouterr().out
    assert "site-0.pub" in told and "earlier one was lost" not in told
    (tmp_path / "state" / "node.key").unlink()
    with pytest.raises(ValueError, match="there is no such file"):
        run_client(config, str(rows / "site-0.jsonl"), state_dir=str(tmp_path / "state"), certificate="absent.crt")
    assert "the earlier one was lost" in capsys.readouterr().out


@pytest.mark.parametrize("client_id", ["a\nb", " a", "x" * 101])
def test_client_id_must_be_one_that_servers_take(tmp_path, rows, write_config, client_id):
    with pytest.raises(ValueError, match="--client_id: .* is no client id"):
        run_client(str(write_config()), str(rows / "site-0.jsonl"), client_id=client_id, state_dir=str(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "options, flags, message",
    [
        ({}, ["--lisen", "::"], "Unknown option `--lisen`; did you mean `--listen`?"),
        ({}, ["--num_round", "3"], "Unknown option `--num_round`; did you mean `--num_rounds`?"),
        ({"lost_timeuot": 3}, [], "unknown key `lost_timeuot`; did you mean `lost_timeout`?"),
        ({"num_rounds": True}, [], "`num_rounds: true`; expected a value of type int"),
        ({"trainer": "absent.py:make"}, [], "expected FILE.py:FUNCTION"),
        ({}, ["--clients_per_round", "5"], "--clients_per_round 5, but there are only 3 clients"),
    ],
)
def test_wrong_configuration_is_told_in_options(write_config, options, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings(write_config(**options), flags, ["listen", "hosts"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_rounds", "x"], "invalid int value: 'x'"),
        pytest.param(["--bse_bits", "3"], "base_bits", marks=pytest.mark.slow),
    ],
)
def test_wrong_configuration_is_noticed_before_anything_starts(tmp_path, write_config, capsys, flags, message):
    config, state = str(write_config()), str(tmp_path / "state")
    with pytest.raises(SystemExit) as end:
        main(["server", "--config", config, "--state_dir", state, *flags])
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith("fedlpp-hf: error: ") and message in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["federation.yaml"]


def test_recipes_app_is_the_one_that_is_started():
    import tomllib  # not in Python 3.10, which Flower does not support either

    started, by_hand = (
        tomllib.loads(text) for text in (APP_FILES["pyproject.toml"], (RECIPE / "pyproject.toml").read_text())
    )
    assert started["tool"]["flwr"] == by_hand["tool"]["flwr"]
    assert "config" not in started["tool"]["flwr"]["app"]  # it would go to every client
    by_hand = ast.parse((RECIPE / "fedlpp_app.py").read_text()).body[1:]  # without its docstring
    assert [ast.dump(line) for line in ast.parse(APP_FILES["fedlpp_app.py"]).body] == [
        ast.dump(line) for line in by_hand
    ]
