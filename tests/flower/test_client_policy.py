# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A client over Flower with a policy of its own: what the server learns of a refusal, and what a dry run shows and sends."""

import json
import logging
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedlpp_hf.cli.main import main
from fedlpp_hf.client.ledger import ClientLedger
from fedlpp_hf.client.policy import PolicyRefusal
from fedlpp_hf.flower import client_command
from fedlpp_hf.flower.client_settings import ClientSettings
from fedlpp_hf.flower.client_trainer import make_client_trainer, train_task
from fedlpp_hf.flower.errors import SayableError, describe_error
from fedlpp_hf.trainer import record_run
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate, LocalOptions


@pytest.fixture
def client(settings, llama_base, tmp_path):
    """A function that makes the trainer of a client with a policy, and a task for it."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"input_ids": [{n}, 2], "labels": [{n}, 2]}}\n' for n in range(1, 5))
    )
    config = tmp_path / "federation.yaml"
    config.write_text(
        f"trainer: {Path(__file__).with_name('flower_task.py')}:make_trainer\nmax_steps: 1\nuse_cpu: true\n"
        "per_device_train_batch_size: 2\nlearning_rate: 1.0e-2\nreport_to: none\ndisable_tqdm: true\n"
    )

    def make(policy, **options):
        path = tmp_path / "Jane-Doe.yaml"
        path.write_text(policy)
        made = replace(
            settings,
            config=str(config),
            data=str(tmp_path / "rows.jsonl"),
            client_id="rows",
            policy=str(path),
            **options,
        )
        trainer = make_client_trainer(ClientSettings.read(made.write()), llama_base)
        task = ClientTask("f", 1, 3, "rows", 1, trainer.guard.fingerprint, trainer.guard.initial, LocalOptions())
        return made, trainer, task

    return make


def test_refusal_tells_a_class_and_a_number(client, caplog):
    settings, trainer, task = client("max_rounds: 1\nclip_norm: 0.01\n")
    train_task(trainer, task.to_bytes())
    with caplog.at_level(logging.ERROR):
        try:
            train_task(trainer, replace(task, round=2).to_bytes())
        except RuntimeError as error:
            told = describe_error(error, logging.getLogger("client"))
    assert re.fullmatch("PolicyRefusal; the client's log has its text under [0-9a-f]{8}", told)
    assert "answered 1 rounds, and its policy allows 1" in caplog.text
    assert len(ClientLedger.open(settings.ledger_dir).rounds) == 1


def test_policy_of_a_client_in_sums(client, tmp_path):
    """What it demands of noise must be in the shares, and it counts the members of a sum itself."""
    pytest.importorskip("Crypto", reason="needs the extra `privacy`")
    flags = ("--secure_aggregation", "True", "--weighting", "uniform", "--clip_update_norm", "0.01")
    (tmp_path / "state").mkdir(exist_ok=True)
    _, trainer, task = client("min_noise_multiplier: 2\nmin_clients: 5\n", flags=flags)
    assert trainer.sums.least == 5
    task = replace(task, num_clients=5, noise_multiplier=9.0)
    for options, said in ((LocalOptions(), "share_noise=0"), (LocalOptions(share_noise=1.0), "share_noise=1")):
        with pytest.raises(PolicyRefusal, match=f"announces {said}; the policy demands at least 2"):
            train_task(trainer, replace(task, options=options).to_bytes())
    enough = LocalOptions(share_noise=2.0, share_colluders=1, share_delta=0.1)
    assert train_task(trainer, replace(task, options=enough).to_bytes())


def test_task_of_a_noisy_sum_is_not_answered_in_the_clear(client):
    """With no word of it in the policy; the server would refuse the update, but have it."""
    settings, trainer, task = client("max_rounds: 1\n")
    with pytest.raises(
        SayableError, match="would send its update in the clear, without noise; set secure_aggregation"
    ):
        train_task(trainer, replace(task, options=LocalOptions(share_noise=2.0, share_delta=0.1)).to_bytes())
    assert not ClientLedger.open(settings.ledger_dir).rounds  # nothing was trained


@pytest.mark.slow
def test_record_level_privacy_is_the_clients(client):
    pytest.importorskip("opacus", reason="needs the extra `privacy`")
    _, trainer, task = client("{max_rounds: 1, record_epsilon: 3, record_delta: 0.1}")
    update = ClientUpdate.from_bytes(train_task(trainer, task.to_bytes()))
    assert 2.9 < update.metrics["record_epsilon"] <= 3 and math.isnan(update.metrics["loss"])


def test_record_level_privacy_that_can_not_be_had_stops_the_trainer(client, monkeypatch):
    monkeypatch.setattr(record_run, "check_record_model", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        client("{max_rounds: 1, record_epsilon: 3, record_delta: 0.1}")


def test_dry_run_shows_the_update_and_sends_a_sentence(client):
    settings, trainer, task = client("clip_norm: 0.01\n", dry_run=True)
    with pytest.raises(SayableError) as told:
        train_task(trainer, replace(task, options=LocalOptions(rule="freeze_a")).to_bytes())
    assert describe_error(told.value, logging.getLogger("client")) == (
        "this client makes a dry run: it trained the task and sends nothing"
    )
    text = settings.dry_run_file.read_text()
    assert "the change's norm is 0.01." in text and "| num_examples | 4 |" in text
    assert "lora_B.weight | 64 × 4 | float32" in text and "lora_A" not in text
    assert settings.dry_run_file.stat().st_mode & 0o077 == 0 and not settings.ledger_dir.exists()


def test_dry_run_shows_why_a_task_was_refused(client):
    settings, trainer, task = client("rules: [freeze_a]\n", dry_run=True)
    with pytest.raises(PolicyRefusal):
        train_task(trainer, task.to_bytes())
    shown = settings.dry_run_file.read_text()
    assert shown.startswith("The task was not trained: PolicyRefusal: The task has the rule 'fedavg'")


def test_command_ends_after_the_dry_run(tmp_path, monkeypatch, capsys):
    """With a stand-in for the SuperNode, whose trainer writes the file; without one, the loop goes on as ever."""
    file = tmp_path / "dry_run.md"
    code = (
        f"import pathlib, time; time.sleep(0.3); pathlib.Path({str(file)!r}).write_text('| tensor |'); time.sleep(1)"
    )
    monkeypatch.setattr(client_command, "_RESTART_SECONDS", 0)
    settings = ClientSettings("config", "data", "site", str(tmp_path), "cache", dry_run=True)
    file.write_text("of yesterday")
    client_command._keep_running([sys.executable, "-c", code], settings)
    shown = capsys.readouterr().out
    assert "| tensor |" in shown and "Nothing was sent" in shown and "yesterday" not in shown
    node = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    assert client_command._wait_for_dry_run(node, tmp_path / "absent.md") == 3


@pytest.mark.slow
def test_wrong_policy_is_noticed_before_anything_starts(tmp_path, rows, write_config, capsys):
    policy = tmp_path / "policy.yaml"
    policy.write_text("clip_nrom: 1\n")
    state = tmp_path / "state"
    arguments = ["--config", str(write_config()), "--data", str(rows / "site-0.jsonl"), "--state_dir", str(state)]
    with pytest.raises(SystemExit) as end:
        main(["client", *arguments, "--policy", str(policy), "--insecure"])
    told = capsys.readouterr().err
    assert (
        end.value.code == 2 and "unknown key `clip_nrom`; did you mean `clip_norm`" in told and told.count("\n") == 1
    )
    assert not state.exists()


def test_settings_of_an_older_client_are_read(settings):
    file = settings.write()
    values = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("policy", "dry_run")}
    file.write_text(json.dumps(values))
    assert ClientSettings.read(file) == settings
