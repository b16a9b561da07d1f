# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients' keys are registered at the SuperLink, also those that are added while it runs."""

import json
import shutil
import time

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

from fedlpp_hf.flower import superlink_control
from fedlpp_hf.flower.certificates import make_node_key
from fedlpp_hf.flower.superlink_control import register_clients, watch_keys, write_app


@pytest.fixture
def registered(monkeypatch):
    """The names that were registered at a SuperLink that takes every key."""
    names = []

    def flwr(environment, *arguments):
        assert arguments[:2] == ("supernode", "register")
        names.append(arguments[-1])
        return {"success": True}

    monkeypatch.setattr(superlink_control, "_flwr", flwr)
    monkeypatch.setattr(superlink_control, "_WATCH_SECONDS", 0.01)
    return names


@pytest.fixture
def keys(tmp_path):
    """The directory of --client_keys, with one key in it."""
    (tmp_path / "keys").mkdir()
    for name in ("a", "b"):
        make_node_key(tmp_path / name)
    shutil.copy(tmp_path / "a" / "node.pub", tmp_path / "keys" / "a.pub")
    return tmp_path / "keys"


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_key_is_registered_once(tmp_path, keys, registered):
    for _ in range(2):
        register_clients(tmp_path, str(keys), {})
    shutil.copy(keys / "a.pub", keys / "a2.pub")  # another id of the same key
    register_clients(tmp_path, str(keys), {})
    assert registered == ["a"]


def test_keys_that_are_added_meanwhile_are_registered(tmp_path, keys, registered, capsys):
    with watch_keys(tmp_path, str(keys), {}):
        wait_for(lambda: registered == ["a"])
        (keys / "b.pub").write_text("half of a")
        wait_for(lambda: "can't be read as a public key" in capsys.readouterr().out)
        time.sleep(0.1)
        assert capsys.readouterr().out == ""  # it is told once, and tried again
        shutil.copy(tmp_path / "b" / "node.pub", keys / "b.pub")
        wait_for(lambda: registered == ["a", "b"])
    with watch_keys(tmp_path, None, {}):
        pass
    assert registered == ["a", "b"]


def test_server_and_gate_learn_where_the_keys_are(tmp_path, keys):
    (tmp_path / "server.limit").write_text("5")  # of an earlier federation's adapter
    for directory, expected in ((str(keys), {"client_keys": str(keys)}), (None, {})):
        write_app(tmp_path, {"address": "127.0.0.1:1", "insecure": True}, "c.yaml", ["--seed", "1"], directory)
        found = json.loads((tmp_path / "server.json").read_text())
        assert found.pop("flags") == ["--seed", "1"] and found.pop("config").endswith("c.yaml")
        assert found == expected
    assert not (tmp_path / "server.limit").exists()
