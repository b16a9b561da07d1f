# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A process beside this one: what it begins with, and how its failures come back."""

import os
import subprocess
import sys
import types
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

    def die(self, tensors):
        os._exit(3)


def make_failing_handler(setup, scratch):
    return FailingHandler()


def test_failures_come_back_as_what_they_are(capfd):
    service = Service("test", make_failing_handler, None)
    with pytest.raises(ValueError, match="The test's process: ValueError: no such thing"):
        service.ask("refuse")
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


def test_module_that_the_process_can_not_find_is_named(monkeypatch, capfd):
    module = types.ModuleType("typed_into_memory")
    exec("class Setup: pass", vars(module))
    monkeypatch.setitem(sys.modules, "typed_into_memory", module)
    service = Service("test", make_environment_handler, module.Setup)
    with pytest.raises(ValueError, match="can't read what it was given.*typed_into_memory.*on its path"):
        service.ask("read", name="HOME")
    service.close()
    assert "ModuleNotFoundError" in capfd.readouterr().err
