# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation in another process, watched and steered as its owner does it: by commands, and over HTTP."""

import json
import os
import stat
import subprocess
import sys
import time
import urllib.request

import pytest

from fedlpp_hf import RoundStore
from fedlpp_hf.cli.main import main
from fedlpp_hf.processes.control import KEY_FILE, SOCKET_FILE
from fedlpp_hf.tensors.adapters import read_adapter
from tests.helpers import ROOT, assert_equal, find_free_port


TOKEN = "hf_" + "s3cret" * 5


@pytest.fixture
def command(capsys):
    """A function that runs `fedlpp-hf`: (exit code, standard output, standard error)."""

    def run(*arguments):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def fetch(port, path) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return answer.read().decode()


@pytest.mark.slow
def test_watched_paused_stopped_and_resumed(llama_base, tmp_path, command):
    """Neither a pause, nor a client that is dropped and taken back, nor a stop with a resume changes a bit."""
    gates, cut, whole = tmp_path / "gates", tmp_path / "cut", tmp_path / "whole"
    gates.mkdir()
    port = find_free_port()
    script = [sys.executable, "-m", "tests.integration.steered_run", str(llama_base)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_TOKEN": TOKEN}

    def status():
        code, out, err = command("status", cut, "--json")
        assert code == 0, err
        return json.loads(out)

    def wait_for(**expected):
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            assert run.poll() is None, "the run ended early"
            if (cut / "_federation").is_dir() and command("status", cut)[0] == 0:
                seen = status()
                if all(seen[name] == value for name, value in expected.items()):
                    return seen
            time.sleep(0.05)
        raise AssertionError(seen)

    log = tmp_path / "run.jsonl"
    run = subprocess.Popen(
        [*script, str(cut), str(gates), "begin", str(port), str(log)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        (gates / "1").touch()
        seen = wait_for(phase="round", round=2)
        assert seen["committed"] == 1 and seen["num_rounds"] == 5 and seen["process"]["pid"] == run.pid
        # One after the other, in this process.
        assert [(client["id"], client["state"]) for client in seen["clients"]] == [
            ("site-0", "training"), ("site-1", "queued"), ("site-2", "queued")
        ]  # fmt: skip
        first = RoundStore(cut).records()[1]
        assert seen["bytes_up"] == first["bytes_up"] and seen["bytes_down"] == 2 * first["bytes_down"]
        assert seen["clients"][0]["accepted"] == 1 and seen["clients"][0]["asked"] == 2 and seen["seconds_left"] > 0
        for path in (cut / "_federation" / SOCKET_FILE, cut / "_federation" / KEY_FILE, log):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert stat.S_IMODE((cut / "_federation").stat().st_mode) == 0o700

        assert fetch(port, "/healthz") == "ok: round\n"
        metrics = fetch(port, "/metrics")
        assert 'fedlpp_phase{phase="round"} 1\n' in metrics and "fedlpp_rounds_committed 1\n" in metrics
        assert 'fedlpp_metric{view="proxy",name="eval_loss"}' in metrics
        assert str(tmp_path) not in metrics and TOKEN not in metrics

        assert "Round 2 is the last" not in command("pause", cut)[1]
        assert wait_for(pausing=True)["phase"] == "round"
        (gates / "2").touch()
        (gates / "3").touch()
        wait_for(phase="paused")
        time.sleep(1.5)  # several ticks; a round takes a tenth of that
        assert status()["committed"] == 2 and not RoundStore(cut).round_dir(3).exists()
        assert command("drop", cut, "site-3")[0] == 2
        assert "did you mean" in command("drop", cut, "site-3")[2]
        assert command("drop", cut, "site-1") == (0, "From round 3 on, not asked: site-1.\n", "")
        code, _, err = command("drop", cut, "site-0")
        assert code == 2 and "round 3 would ask 1; min_clients=2" in err
        assert [client["state"] for client in status()["clients"]] == ["idle", "dropped", "idle"]
        assert command("drop", cut, "site-1", "--undo")[1] == "From round 3 on, not asked: nobody.\n"
        code, table, _ = command("status", cut)
        assert code == 0 and "paused; 2 of 5 rounds committed" in table and "site-2" in table
        (gates / "3").unlink()
        assert command("resume", cut)[0] == 0
        wait_for(phase="round", round=3)
        assert command("resume", cut)[2] == "fedlpp-hf: error: The federation is not paused.\n"
        assert command("stop", cut)[1].startswith("Round 3 is the last of this run.")
        (gates / "3").touch()
        _, errors = run.communicate(timeout=100)
        assert run.returncode == 0, errors
    finally:
        run.kill()
        run.wait()
    assert RoundStore(cut).latest() == 3
    assert (cut / "adapter_model.safetensors").exists() and (cut / "report.html").exists()
    assert not (cut / "_federation" / SOCKET_FILE).exists()
    after = status()
    assert after["phase"] == "not running" and after["process"] is None and after["committed"] == 3
    code, _, err = command("stop", cut)
    assert code == 2 and "No process runs a federation" in err and "--resume_from_checkpoint true" in err
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("drop 'site-1'" in line["message"] for line in lines) and TOKEN not in log.read_text()

    for number in range(6):
        (gates / str(number)).touch()
    for output_dir, how in ((cut, "resume"), (whole, "begin")):
        subprocess.run([*script, str(output_dir), str(gates), how], check=True, cwd=ROOT, env=environment, timeout=120)
    assert RoundStore(cut).latest() == 5
    assert_equal(*(read_adapter(output_dir)[0] for output_dir in (cut, whole)))
