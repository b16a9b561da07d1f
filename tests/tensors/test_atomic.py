# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A file is the old one or the new one, never half of it."""

import hashlib
import os

import pytest

from fedlpp_hf.tensors.atomic import hash_file, write_atomically


def test_file_and_its_folders_are_written(tmp_path):
    for data in (b"first", b"second, which is longer", b"3"):
        write_atomically(tmp_path / "a" / "b" / "file", data)
        assert (tmp_path / "a" / "b" / "file").read_bytes() == data
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


def test_data_are_on_disk_before_they_get_the_name(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("sync") or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda *names: events.append("replace") or replace(*names))
    write_atomically(path, b"data")
    assert events == ["sync", "replace", "sync"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_file_stays_as_it_was_when_the_disk_fails(tmp_path, monkeypatch, function):
    def fail(*arguments):
        raise OSError("No space left on device")

    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("size", [0, 5, (1 << 20) + 3])
def test_digest_of_a_file(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert hash_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()
