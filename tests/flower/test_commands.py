# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What `fedlpp-hf server` and `fedlpp-hf client` start, and what they refuse before that."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

from fedlpp_hf.flower.client_command import run_client
from fedlpp_hf.flower.server_command import run_server
from fedlpp_hf.flower.superlink_control import APP_FILES


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
    assert "site-0.pub" in capsys.readouterr().out


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
