# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients sign with their node's key, and know the others' from files that the server did not give them."""

import shutil
from dataclasses import replace

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

from fedlpp_hf.flower.certificates import make_node_key
from fedlpp_hf.flower.client_command import run_client
from fedlpp_hf.flower.peers import read_identity, read_peers


@pytest.fixture
def peers(tmp_path, settings):
    """Settings of two clients, who have each other's keys and no third one's."""
    (tmp_path / "peers").mkdir()
    found = []
    for client in ("a", "b"):
        state = tmp_path / client
        make_node_key(state)
        shutil.copy(state / "node.pub", tmp_path / "peers" / f"{client}.pub")
        found.append(replace(settings, state_dir=str(state), client_id=client, peer_keys=str(tmp_path / "peers")))
    return found


def test_signatures_are_verified_by_the_files(peers):
    a, b = map(read_identity, peers)
    signature = a.sign(b"text")
    assert b.verify("a", signature, b"text")
    assert not b.verify("a", signature, b"another text")
    assert not b.verify("b", signature, b"text")
    assert not b.verify("stranger", signature, b"text")
    assert not b.verify("a", b"", b"text")


def test_own_key_must_be_there(peers):
    with pytest.raises(ValueError, match="has no `c.pub` with this client's own key"):
        read_identity(replace(peers[0], client_id="c"))
    with pytest.raises(ValueError, match="has no `b.pub` with this client's own key"):  # that is another one's
        read_identity(replace(peers[0], client_id="b"))


def test_directory_without_keys_is_refused(peers, tmp_path):
    with pytest.raises(ValueError, match="has no `\\*.pub`; expected the node.pub of every client"):
        read_peers(tmp_path / "a" / "nothing")
    (tmp_path / "peers" / "c.pub").write_text("no key")
    with pytest.raises(ValueError, match="can't be read as a public key"):
        read_identity(peers[0])


def test_without_a_directory_there_is_no_identity(settings):
    assert read_identity(settings) is None


def test_client_without_a_node_key_can_not_sign(peers, tmp_path, write_config, rows):
    options = {"state_dir": str(tmp_path / "s"), "peer_keys": peers[0].peer_keys}
    with pytest.raises(ValueError, match="--peer_keys with --insecure: without a node key this client can't sign"):
        run_client(str(write_config()), str(rows / "site-0.jsonl"), insecure=True, **options)
    assert not (tmp_path / "s").exists()
