# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A process beside this one: what it begins with, and how its failures come back."""

import os

import pytest

from fedlpp_hf.processes.service import Service


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
