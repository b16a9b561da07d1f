# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The result is on disk whole or not at all: kills, full disks, damage, two merges at once."""

import contextlib
import ctypes
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlpp_hf.base.shards import read_shard
from fedlpp_hf.merge import copying, jobs, rows, sinks, writing
from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.tensors.adapters import ADAPTER_WEIGHTS
from tests.helpers import (
    make_pair,
    read_files,
)


def test_verify_finds_a_flipped_bit_anywhere(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path)
    offset = 0

    class DamagingWriter(sinks.FileWriter):
        def __exit__(self, *error):
            super().__exit__(*error)
            with open(self.path, "r+b") as file:
                file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(writing, "FileWriter", DamagingWriter)
    for offset in (20, 5000, -1, -7000):  # noqa: B007 (the class above reads it)
        with pytest.raises((RuntimeError, ValueError)):
            merge_adapter(full, adapter, tmp_path / "out", verify=True)
        assert not (tmp_path / "out").exists()
    merge_adapter(full, adapter, tmp_path / "unchecked")


def test_destinations_that_can_not_be(tmp_path):
    full, adapter, _ = make_pair(tmp_path)
    for destination in (full / "out", full, tmp_path):
        with pytest.raises(ValueError, match="is inside the other|not an empty directory"):
            merge_adapter(full, adapter, destination)
    with pytest.raises(ValueError, match="base_dir"):
        merge_adapter(full, adapter, tmp_path / "out", base_weight=0.5)
    with pytest.raises(ValueError, match="from 0 .* to 1"):
        merge_adapter(full, adapter, tmp_path / "out", base_weight=1.5)
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"device='{device}' can't be used"):
            merge_adapter(full, adapter, tmp_path / "out", device=device)
    with pytest.raises(ValueError, match="can't be fetched again"):
        merge_adapter(full, adapter, tmp_path / "out", delete_source_shards=True)
    (tmp_path / "file").write_text("")
    for destination in (tmp_path / "file" / "out", Path("/proc/out")):  # the latter is read-only to root, too
        with pytest.raises(OSError):
            merge_adapter(full, adapter, destination)


def test_two_merges_to_one_place(tmp_path):
    import fcntl

    full, adapter, _ = make_pair(tmp_path)
    (tmp_path / ".out.merging").mkdir()
    (tmp_path / ".out.merging" / "left by a killed merge").write_text("")
    lock = os.open(tmp_path / ".out.merging", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(RuntimeError, match="Another process"):
        merge_adapter(full, adapter, tmp_path / "out")
    os.close(lock)
    merge_adapter(full, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "left by a killed merge").exists()


def test_a_full_disk_is_known_before_anything_is_written(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="needs .* GB"):
        merge_adapter(full, adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "adapter"}


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path):
    """Stood in for by a limit on the size of files, at which writes fail, too."""
    full, adapter, _ = make_pair(tmp_path)
    sizes = sorted(path.stat().st_size for path in full.glob("*.safetensors"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            merge_adapter(full, adapter, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "adapter"}


def test_copies_without_the_kernels_help(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path)
    merge_adapter(full, adapter, tmp_path / "kernel")

    def refuse(*arguments):
        raise OSError(18, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    merge_adapter(full, adapter, tmp_path / "buffered", verify=True)
    assert read_files(tmp_path / "kernel") == read_files(tmp_path / "buffered")


def test_file_systems_that_share_blocks(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path)
    copied = merge_adapter(full, adapter, tmp_path / "copied")

    def clone(source, destination):
        os.copy_file_range(source, destination, os.fstat(source).st_size)
        return True

    for module in (sinks, copying):
        monkeypatch.setattr(module, "clone_file", clone)
    # Room is needed for what is rewritten alone.
    room = shutil._ntuple_diskusage(1 << 30, 0, copied.bytes_rewritten)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    merge_adapter(full, adapter, tmp_path / "cloned", verify=True)
    assert read_files(tmp_path / "copied") == read_files(tmp_path / "cloned")
    room = room._replace(free=room.free - 1)
    with pytest.raises(OSError, match="needs .* GB"):
        merge_adapter(full, adapter, tmp_path / "no room")


def test_a_file_system_that_shares_blocks(tmp_path, monkeypatch):
    """The same for real; run it with `--basetemp` on btrfs or XFS."""
    full, adapter, _ = make_pair(tmp_path)
    if not copying.can_share_blocks(next(full.glob("*.safetensors")), tmp_path):
        pytest.skip("this file system has no reflinks")
    before, cloned, clone_file = read_files(full), [], sinks.clone_file
    monkeypatch.setattr(sinks, "clone_file", lambda *files: cloned.append(clone_file(*files)) or cloned[-1])
    merge_adapter(full, adapter, tmp_path / "out", verify=True)
    assert cloned == [True] * len(list(full.glob("*.safetensors"))) and read_files(full) == before
    shutil.rmtree(full)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_untouched_files_and_ranges_are_the_same_bytes(tmp_path):
    full, adapter, _ = make_pair(tmp_path, layers_to_transform=[1])
    (full / "tokenizer.json").write_text("{}")
    (full / "_federation").mkdir()
    (full / "_federation" / "federation.json").write_text("{}")
    (full / "code.py").write_text("# custom code")
    (full / "adapter_model.safetensors").write_bytes((adapter / ADAPTER_WEIGHTS).read_bytes())
    report = merge_adapter(full, adapter, tmp_path / "out")
    ours, theirs = read_files(tmp_path / "out"), read_files(full)
    assert set(theirs) - set(ours) == {"_federation/federation.json", "adapter_model.safetensors"}
    changed = {name for name in ours if ours[name] != theirs[name]}
    index = json.loads(theirs["model.safetensors.index.json"])["weight_map"]
    assert changed == {index[layer.parameter] for layer in report.layers} and len(report.layers) == 2


def test_small_chunks_give_the_same_bits(tmp_path, monkeypatch):
    full, adapter, _ = make_pair(tmp_path, "mixtral", target_modules="all-linear")
    merge_adapter(full, adapter, tmp_path / "whole", threads=1)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1)
    monkeypatch.setattr(jobs, "BLOCK_BYTES", 4096)
    merge_adapter(full, adapter, tmp_path / "rows", threads=3, verify=True)
    assert read_files(tmp_path / "whole") == read_files(tmp_path / "rows")


@pytest.mark.parametrize("alpha", [6, 8])  # a scale of 1.5, and a power of two, which has another product
def test_distance_between_rows_in_memory_does_not_show(tmp_path, monkeypatch, alpha):
    """In 16 bits, where chunks are computed in another place than they are read to."""
    full, adapter, _ = make_pair(tmp_path, dtype=torch.bfloat16, target_modules="all-linear", lora_alpha=alpha)
    merge_adapter(full, adapter, tmp_path / "padded")
    monkeypatch.setattr(rows, "PADDING", 0)
    merge_adapter(full, adapter, tmp_path / "dense")
    assert read_files(tmp_path / "padded") == read_files(tmp_path / "dense") != read_files(full)


@pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP, errno.ENOSPC])
def test_room_is_reserved_where_it_can_be(tmp_path, monkeypatch, number):
    class System:
        def fallocate(self, *arguments):
            ctypes.set_errno(number)
            return -1

    if number is not None:
        monkeypatch.setattr(copying, "_libc", System())
    with open(tmp_path / "file", "wb") as file:
        if number == errno.ENOSPC:
            with pytest.raises(OSError, match="No space left"):
                copying.reserve_file(file.fileno(), 10**6)
            return
        copying.reserve_file(file.fileno(), 10**6)
        assert os.fstat(file.fileno()).st_size == 10**6


@pytest.mark.parametrize("has_call", [True, False])
def test_the_disk_works_while_rows_are_computed(tmp_path, monkeypatch, has_call):
    """Every byte but the header's is on its way before the wait, if there is one; a system without the call only waits."""
    full, adapter, _ = make_pair(tmp_path, target_modules="all-linear")
    if not has_call:
        monkeypatch.setattr(copying, "_libc", object())
    begun, waited, start, fsync = {}, [], copying.start_writeback, os.fsync

    def note(descriptor, at, length):
        begun.setdefault(os.fstat(descriptor).st_ino, []).append((at, at + length))
        start(descriptor, at, length)

    def wait(descriptor):
        waited.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(sinks, "start_writeback", note)
    monkeypatch.setattr(os, "fsync", wait)
    merge_adapter(full, adapter, tmp_path / "later", sync=False)
    assert not begun and not waited
    merge_adapter(full, adapter, tmp_path / "now")
    assert read_files(tmp_path / "now") == read_files(tmp_path / "later")
    for path in (tmp_path / "now").glob("*.safetensors"):
        ranges = sorted(begun[path.stat().st_ino])
        assert ranges[0][0] == len(read_shard(path).header) and ranges[-1][1] == path.stat().st_size
        assert all(one[1] == following[0] for one, following in itertools.pairwise(ranges))
        assert path.stat().st_ino in waited


def test_disk_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """The error of a write that was begun early comes with the wait, at the same descriptor."""
    full, adapter, _ = make_pair(tmp_path)
    fsync = os.fsync

    def fail(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        merge_adapter(full, adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "adapter"}


def test_a_killed_merge_leaves_nothing_or_everything(tmp_path):
    """One process merges again and again, so that a kill finds it anywhere; there is no time to start twenty."""
    full, adapter, _ = make_pair(tmp_path)
    out = tmp_path / "out"
    merge_adapter(full, adapter, tmp_path / "complete", verify=True)
    expected = read_files(tmp_path / "complete")
    script = (
        "import os, shutil, sys\nfrom fedlpp_hf.merge.merge import merge_adapter\n"
        "for line in sys.stdin:\n"
        "    if os.fork():\n        print(os.wait()[1], flush=True)\n        continue\n"
        "    print('go', flush=True)\n    merge_adapter(*sys.argv[1:], sync=False)\n    os._exit(0)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, str(full), str(adapter), str(out)]
    kills = random.Random(0)
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-3, text=True, env=environment) as process:
        outcomes, duration = set(), None
        for _ in range(21):
            process.stdin.write("again\n")
            process.stdin.flush()
            assert process.stdout.readline() == "go\n"
            began = time.perf_counter()
            if duration is not None:  # the first one is left alone, to know how long they take here and now
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                time.sleep(kills.random() * duration)
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(int(children[0]), signal.SIGKILL)
            process.stdout.readline()
            duration = duration or time.perf_counter() - began
            outcomes.add(out.exists())
            if out.exists():
                assert read_files(out) == expected
                shutil.rmtree(out)
        process.stdin.close()
    merge_adapter(full, adapter, out, verify=True)
    assert read_files(out) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"full", "adapter", "complete", "out"}
    assert False in outcomes


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_in_the_full_model_become_files_in_the_result(tmp_path, link):
    """As in the Hub's cache: nothing is written through them."""
    full, adapter, _ = make_pair(tmp_path)
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    full.rename(blobs)
    before = read_files(blobs)
    for path in blobs.iterdir():
        link(path, snapshot / path.name)
    merge_adapter(snapshot, adapter, tmp_path / "out")
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in (tmp_path / "out").iterdir())
    assert read_files(blobs) == before
