# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which ids a node's key may announce."""

import base64
import os
import shutil

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

from flwr.cli.supernode.register import try_load_public_key

from fedlpp_hf.flower.certificates import make_node_key
from fedlpp_hf.flower.client_keys import ClientKeys, read_public_key


@pytest.fixture
def make_key(tmp_path):
    """A function that makes a node's key and returns the path of its public one."""

    def make(name):
        make_node_key(tmp_path / name)
        return tmp_path / name / "node.pub"

    return make


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "keys").mkdir()
    return tmp_path / "keys"


def test_files_name_the_ids(directory, make_key):
    one, two = make_key("one"), make_key("two")
    shutil.copy(one, directory / "clinic-a.pub")
    shutil.copy(two, directory / "clinic-b.pub")
    # Another comment, which a client may write as it likes, makes no other key.
    (directory / "clinic-c.pub").write_text(one.read_text().strip() + " clinic-b\n")
    keys = ClientKeys(directory)
    assert keys.find_ids(read_public_key(one)) == ("clinic-a", "clinic-c")
    assert keys.find_ids(read_public_key(two)) == ("clinic-b",)
    assert keys.find_ids(b"") == keys.find_ids(read_public_key(make_key("three"))) == ()
    assert keys.list_holders() == [("clinic-a", "clinic-c"), ("clinic-b",)]


def test_keys_are_those_that_flower_keeps(make_key):
    assert read_public_key(make_key("one")) == try_load_public_key(make_key("one"))


def test_keys_come_and_go_while_the_server_runs(directory, make_key):
    one, two = make_key("one"), make_key("two")
    keys = ClientKeys(directory)
    assert keys.list_holders() == []
    shutil.copy(one, directory / "a.pub")
    assert keys.find_ids(read_public_key(one)) == ("a",)
    shutil.copy(two, directory / "a.pub")  # another key for the id
    os.utime(directory / "a.pub", ns=(1, 1))
    assert keys.find_ids(read_public_key(one)) == () and keys.find_ids(read_public_key(two)) == ("a",)
    (directory / "a.pub").unlink()
    assert keys.find_ids(read_public_key(two)) == ()


@pytest.mark.parametrize("text", ["", "ssh-ed25519 AAAA", "x" * 20_000, "\ud800"])
def test_file_without_a_key_registers_nobody(directory, make_key, text, caplog):
    (directory / "a.pub").write_bytes(text.encode(errors="surrogatepass"))
    shutil.copy(make_key("one"), directory / "b.pub")
    keys = ClientKeys(directory)
    assert keys.list_holders() == keys.list_holders() == [("b",)]
    assert caplog.text.count("can't be read as a public key") == 1
    with pytest.raises(ValueError, match="expected the node.pub that the client sent"):
        read_public_key(directory / "a.pub")


def test_key_with_a_compressed_point_registers_nobody(directory, make_key):
    """cryptography answers it with NotImplementedError, which would end the server."""
    kind, data, *_ = make_key("one").read_text().split()
    point = 97  # bytes, of P-384, uncompressed
    blob = base64.b64decode(data)
    blob = blob[:-point] + b"\x02" + blob[-point + 1 :]
    (directory / "a.pub").write_text(f"{kind} {base64.b64encode(blob).decode()}\n")
    assert ClientKeys(directory).list_holders() == []
