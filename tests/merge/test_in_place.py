# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A merge in place can be undone."""

import os
import shutil

import pytest

from fedlpp_hf.merge.in_place import undo_merge_
from fedlpp_hf.merge.streaming import merge_adapter

from ..helpers import make_pair, read_files


def test_in_place_equals_a_new_copy_and_can_be_undone(tmp_path):
    full, adapter, _ = make_pair(tmp_path)
    merge_adapter(full, adapter, tmp_path / "out")
    shutil.copytree(full, tmp_path / "copy")
    before = read_files(full)
    for arguments in ({"output_dir": tmp_path / "copy"}, {}):
        directory = arguments.get("output_dir", full)
        report = merge_adapter(full, adapter, in_place=True, verify=True, **arguments)
        patched = {name: data for name, data in read_files(directory).items() if not name.startswith("_merge_undo")}
        assert patched == read_files(tmp_path / "out") and report.verified
        with pytest.raises(ValueError, match="already"):
            merge_adapter(full, adapter, in_place=True, **arguments)
        undo_merge_(directory)
        assert read_files(directory) == before
    with pytest.raises(ValueError, match="nothing to undo|no merge in place"):
        undo_merge_(full)


def test_in_place_takes_back_a_merge_that_fails_and_refuses_a_half_one(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path)
    before = read_files(full)
    calls = []

    def fail(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError("no power")
        return run_jobs(*arguments, **keywords)

    from fedlpp_hf.merge import in_place

    run_jobs = in_place.run_jobs
    monkeypatch.setattr(in_place, "run_jobs", fail)
    with pytest.raises(OSError, match="no power"):
        merge_adapter(full, adapter, in_place=True)
    assert read_files(full) == before
    calls.clear()
    monkeypatch.setattr(in_place, "undo_merge_", lambda directory: None)  # as if the process had been killed
    with pytest.raises(OSError, match="no power"):
        merge_adapter(full, adapter, in_place=True)
    assert read_files(full) != before
    with pytest.raises(ValueError, match="interrupted"):
        merge_adapter(full, adapter, tmp_path / "out")
    undo_merge_(full)
    assert read_files(full) == before


def test_in_place_leaves_read_only_files_alone(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path)
    before, access = read_files(full), os.access
    # root, as whom tests often run, may write to any file; what it is told stands in for what others are.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    with pytest.raises(ValueError, match="is read-only"):
        merge_adapter(full, adapter, in_place=True)
    assert read_files(full) == before


def test_in_place_never_writes_through_a_link(tmp_path):
    full, adapter, _ = make_pair(tmp_path)
    before = read_files(full)
    snapshot, hard = tmp_path / "snapshot", tmp_path / "hard"
    for directory, link in ((snapshot, os.symlink), (hard, os.link)):
        directory.mkdir()
        for path in full.iterdir():
            link(path, directory / path.name)
        with pytest.raises(ValueError, match="is a link"):
            merge_adapter(directory, adapter, in_place=True)
    merge_adapter(snapshot, adapter, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert read_files(full) == before
