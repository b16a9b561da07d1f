# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A process beside this one: what it begins with, and how its failures come back."""

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedlpp_hf.processes.service import Service


# Not from tests.helpers: the processes import this module, and should not have to load transformers for it.
ROOT = Path(__file__).parents[2]


class EnvironmentHandler:
    def read(self, tensors, name):
        return {"value": os.environ.get(name)}, {}


def make_environment_handler(setup, scratch):
    return EnvironmentHandler()


def test_a_process_begins_in_its_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    service = Service("environment", make_environment_handler, None, {"CUDA_VISIBLE_DEVICES": "7"})
    assert service.ask("read", name="CUDA_VISIBLE_DEVICES")[0] == {"value": "7"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"
    service.close()


class FailingHandler:
    def refuse(self, tensors):
        raise ValueError("no such thing")

    def break_down(self, tensors):
        raise KeyError("internal")

    def refuse_as_a_library(self, tensors):
        raise UnicodeError("not mine")

    def die(self, tensors):
        os._exit(3)


def make_failing_handler(setup, scratch):
    return FailingHandler()


def test_failures_come_back_as_what_they_are(capfd):
    service = Service("test", make_failing_handler, None)
    with pytest.raises(ValueError, match="The test's process: ValueError: no such thing"):
        service.ask("refuse")
    with pytest.raises(ValueError, match="The test's process: UnicodeError: not mine"):  # of a kind of its own
        service.ask("refuse_as_a_library")
    with pytest.raises(RuntimeError, match="The test's process: KeyError: 'internal'"):
        service.ask("break_down")
    with pytest.raises(RuntimeError, match=r"The test's process died during `die` \(exit code 3\)"):
        service.ask("die")
    assert "Traceback" in capfd.readouterr().err  # where the process is, its own messages are
    service.close()
    service.close()


SCRIPT = """
from fedlpp_hf.processes.service import Service

print("once")
FACTOR = 3

def test_nothing_is_left_of_a_process_that_was_killed(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    service, other = (Service("echo", make_failing_handler, None) for _ in range(2))
    for one in (service, other):
        with pytest.raises(ValueError, match="no such thing"):
            one.ask("refuse")  # it is at work
    with pytest.raises(RuntimeError, match="died"):
        service.ask("die")
    assert len(list(tmp_path.iterdir())) == 2
    service.close()
    assert len(list(tmp_path.iterdir())) == 1  # the other's
    other.close()
    assert not list(tmp_path.iterdir())


class Handler:
    def multiply(self, tensors, number):
        return {"product": FACTOR * number}, {}

service = Service("script", lambda setup, scratch: Handler(), None)
print(service.ask("multiply", number=7)[0])
service.close()
"""


def test_script_needs_no_main_guard(tmp_path):
    """What `__main__` defines travels by value, and the script is not run a second time."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True, env=environment)
    assert run.stdout.splitlines() == ["once", "{'product': 21}"]


def make_dying_handler(setup, scratch):
    os._exit(5)


def make_refusing_handler(setup, scratch):
    raise ValueError("the base is gone")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("size", [0, 1 << 24], ids=["small setup", "larger than any pipe"])
def test_a_process_that_dies_at_its_start_is_no_wait(size, capfd):
    service = Service("test", make_dying_handler, bytes(size))
    with pytest.raises(RuntimeError, match=r"The test's process died during `read` \(exit code 5\)"):
        service.ask("read", name="HOME")
    service.close()
    service = Service("test", make_refusing_handler, bytes(size))
    with pytest.raises(RuntimeError, match="The test's process died"):
        service.ask("read", name="HOME")
    service.close()
    assert "the base is gone" in capfd.readouterr().err


@pytest.mark.timeout(60)
def test_an_interpreter_that_does_not_start_is_no_wait():
    """It reads nothing of what is sent; the parent used to hang there."""
    with pytest.raises(RuntimeError, match="The test's process died during `start`"):
        Service("test", make_dying_handler, bytes(1 << 24), {"PYTHONHOME": "/nowhere"})


def test_a_setup_that_can_not_be_sent_is_one_error():
    lock = threading.Lock()
    with pytest.raises(
        ValueError, match="The test's process can't be given what it needs .*lock.*Make it inside the function"
    ):
        Service("test", make_environment_handler, lambda: lock)


def test_a_setup_that_can_not_be_read_is_one_error(tmp_path, monkeypatch, capfd):
    """A module that only this process can import."""
    (tmp_path / "only_here.py").write_text("def measure(prediction): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("only_here")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    service = Service("test", make_environment_handler, module.measure)
    with pytest.raises(ValueError, match="can't read what it was given .*only_here.*on its path"):
        service.ask("read", name="HOME")
    service.close()
    assert "only_here" in capfd.readouterr().err
