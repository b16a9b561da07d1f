# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Tensors read part by part from safetensors files: what comes back, what is refused, and what is kept open."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from fedlpp_hf.tensors.files import DTYPES, TensorFile, close_files, find_values
from fedlpp_hf.tensors.headers import parse_header, read_header


TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5, dtype=torch.bfloat16)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_read_is_what_was_saved(tmp_path_factory, data):
    tensors = {}
    for place, dtype in enumerate(data.draw(st.lists(st.sampled_from(sorted(DTYPES)), min_size=1, max_size=5))):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(place))
        tensors[f"t{place}"] = values.to(DTYPES[dtype])
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    save_file(tensors, path, metadata=data.draw(st.sampled_from([None, {"format": "pt"}])))
    file, memory = TensorFile(path), memoryview(bytearray(8 * 5**3))
    assert set(file) == set(tensors) and len(file) == len(tensors)
    for key, tensor in tensors.items():
        assert file[key].dtype == tensor.dtype and file[key].shape == tensor.shape
        assert torch.equal(file[key].double(), tensor.double())
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, tensor.numel())] * 2)))
        part = tensor.reshape(-1)[start:end].double()
        for source in (file, tensors):
            for shape, read in (find_values(source, key), find_values(source, key, memory)):
                assert shape == tensor.shape and torch.equal(read(start, end).double(), part)


def test_unknown_key_is_no_tensor(tmp_path):
    save_file(TENSORS, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    assert "c" not in file
    with pytest.raises(KeyError):
        file["c"]


def change_header(change):
    def damage(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        text = json.dumps(change(header) or header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return damage


DAMAGE = {
    "nothing": (lambda data: b"", "truncated or not a safetensors"),
    "half a header": (lambda data: data[:20], "truncated or not a safetensors"),
    "a header of terabytes": (lambda data: struct.pack("<Q", 2**43) + data[8:], "truncated or not a safetensors"),
    "no JSON": (lambda data: data[:8] + b"x" + data[9:], "can't be read"),
    "a list": (change_header(lambda header: [header]), "can't be read"),
    "no offsets": (change_header(lambda header: header["a"].pop("data_offsets") and None), "can't be read"),
    "tensors of terabytes": (change_header(lambda header: header["a"].update(shape=[2**20, 2**20])), "wrong bytes"),
    "another dtype": (change_header(lambda header: header["a"].update(dtype="F64")), "wrong bytes"),
    "overlapping tensors": (
        change_header(lambda header: header["b"].update(data_offsets=header["a"]["data_offsets"])),
        "wrong bytes",
    ),
    "truncated": (lambda data: data[:-1], "truncated or was written to"),
    "trailing bytes": (lambda data: data + b"\0", "truncated or was written to"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_file_is_refused_by_its_name(tmp_path, case):
    damage, reason = DAMAGE[case]
    (tmp_path / "x.safetensors").write_bytes(damage(save(TENSORS)))
    with pytest.raises(ValueError, match=f"x.safetensors` has .*{reason}"):
        TensorFile(tmp_path / "x.safetensors")["a"]


def test_dtype_that_torch_lacks_is_refused_when_it_is_read(tmp_path):
    data = change_header(lambda header: header["a"].update(dtype="F4"))(save(TENSORS))
    (tmp_path / "x").write_bytes(data)
    file = TensorFile(tmp_path / "x")
    assert torch.equal(file["b"], TENSORS["b"])
    with pytest.raises(ValueError, match="`a` has the dtype F4; expected one of F64"):
        file["a"]


def test_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    save_file(TENSORS, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    assert torch.equal(file["a"], TENSORS["a"])
    os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size - 40)
    with pytest.raises(OSError, match="writing to it"):
        file["a"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_few_files_are_open_however_many_are_read(tmp_path):
    def count():
        return sum(os.path.realpath(path).startswith(str(tmp_path)) for path in Path("/proc/self/fd").iterdir())

    files = []
    for number in range(300):
        save_file({"w": torch.full((4,), float(number))}, tmp_path / str(number))
        files.append(TensorFile(tmp_path / str(number)))
    assert count() == 0
    for _ in range(2):
        assert [float(file["w"][0]) for file in files] == list(range(300))
        assert count() == 128
    close_files()
    assert count() == 0


def test_header_that_no_model_has_is_refused_before_it_is_read():
    reads = []

    def read(start: int, length: int) -> bytes:
        reads.append(length)
        return struct.pack("<Q", 32_000_001)

    with pytest.raises(ValueError, match="has a header of 32000001 bytes; expected at most 32000000"):
        read_header(10**10, read)
    assert reads == [8]


def test_header_is_read_through_any_way_to_its_bytes():
    data = save(TENSORS)
    header = read_header(len(data), lambda start, length: data[start : start + length])
    tensors = parse_header(header, len(data))
    for name, tensor in TENSORS.items():
        found = tensors[name]
        assert torch.equal(
            torch.frombuffer(bytearray(data[found.start : found.stop]), dtype=tensor.dtype).view(found.shape), tensor
        )
