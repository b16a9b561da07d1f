# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Safetensors files as ranges of bytes: strictly checked headers, and tensors read whole or part by part."""

import errno
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, slots=True)
class TensorRange:
    """A tensor in a file: bytes `start` to `stop`, counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise ValueError(f"`{self.name}` has the dtype {self.dtype}; expected one of {', '.join(DTYPES)}.")
        return DTYPES[self.dtype]


def read_header(size: int, read: Callable[[int, int], bytes]) -> bytes:
    """Read the header of a safetensors file of `size` bytes, with the eight bytes before it, by `read(offset, length)`.

    Raises:
        ValueError: if the header claims more than there is. The message goes on after the file's name.
    """
    if size < 8 or (length := struct.unpack("<Q", read(0, 8))[0]) > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"has {size} bytes: it is truncated or not a safetensors file")
    return read(0, 8 + length)


def parse_header(header: bytes, size: int) -> dict[str, TensorRange]:
    """List the tensors of a file of `size` bytes in the order of their bytes, from its header (see [`read_header`]).

    Raises:
        ValueError: if the header is damaged, or its tensors don't fill the file exactly, as in a truncated download. The
            message goes on after the file's name.
    """
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        tensors = [
            TensorRange(name, entry["dtype"], tuple(entry["shape"]), *(len(header) + o for o in entry["data_offsets"]))
            for name, entry in entries.items()
        ]
        for tensor in tensors:
            if type(tensor.dtype) is not str or not all(
                _is_size(n) for n in (*tensor.shape, tensor.start, tensor.stop)
            ):
                raise ValueError(f"`{tensor.name}` has a dtype, shape or place that is none")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"has a header that can't be read ({error})") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    position = len(header)
    for tensor in tensors:
        length = tensor.stop - tensor.start
        known = tensor.dtype in DTYPES
        if tensor.start != position or (known and length != math.prod(tensor.shape) * tensor.torch_dtype.itemsize):
            raise ValueError(f"has a header that gives `{tensor.name}` the wrong bytes")
        position = tensor.stop
    if position != size:
        raise ValueError(f"has {size} bytes, but its header describes {position}: it is truncated or was written to")
    return {tensor.name: tensor for tensor in tensors}


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def read_range(descriptor: int, buffer: memoryview, start: int) -> None:
    """Fill `buffer` from offset `start`."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if not count:
            raise OSError(errno.EIO, "the file ended while it was read; is someone writing to it?")
        done += count


def read_tensor(path: str | os.PathLike[str], tensor: TensorRange) -> torch.Tensor:
    """Read one tensor of a file into memory.

    Raises:
        ValueError: if torch has no such dtype.
    """
    data = torch.empty(tensor.stop - tensor.start, dtype=torch.uint8)
    with open(path, "rb", buffering=0) as file:
        read_range(file.fileno(), data.numpy().data, tensor.start)
    return data.view(tensor.torch_dtype).view(tensor.shape)


class TensorFile(Mapping[str, torch.Tensor]):
    """An adapter or an update in a safetensors file; tensors, or parts of them, are read when they are asked for.

    An object takes the memory of its path. The 128 files used last stay open, and equal headers are kept once. Files are
    read and not mapped: a map costs a fault for every few pages, which takes longer than to copy them.

    Raises:
        ValueError: on reading, if the file is damaged or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        stat = os.stat(path)
        self._stamp = (stat.st_mtime_ns, stat.st_size)

    def __getitem__(self, key: str) -> torch.Tensor:
        shape = self.shape_of(key)
        return self.read_values(key, 0, shape.numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._open().tensors)

    def __len__(self) -> int:
        return len(self._open().tensors)

    def shape_of(self, key: str) -> torch.Size:
        """A tensor's shape, from the header."""
        return torch.Size(self._open().tensors[key].shape)

    def read_values(self, key: str, start: int, end: int, memory: memoryview | None = None) -> torch.Tensor:
        """Read values of a tensor, in memory order.

        Args:
            key: the tensor's name.
            start: the first value.
            end: the value after the last.
            memory: where to put them; they are valid until it is used again. By default new memory.
        """
        file = self._open()
        tensor = file.tensors[key]
        size = tensor.torch_dtype.itemsize
        if memory is None:
            memory = torch.empty((end - start) * size, dtype=torch.uint8).numpy().data
        part = memory[: (end - start) * size]
        read_range(file.descriptor, part, tensor.start + start * size)
        return torch.frombuffer(part, dtype=tensor.torch_dtype) if part else torch.empty(0, dtype=tensor.torch_dtype)

    def _open(self) -> "_OpenFile":
        return _open_file(self.path, self._stamp)


Read = Callable[[int, int], torch.Tensor]


def find_values(
    tensors: Mapping[str, torch.Tensor], key: str, memory: memoryview | None = None
) -> tuple[torch.Size, Read]:
    """A tensor's shape, and a function that returns its values from one place to another in memory order, as `(n,)`.

    From a [`TensorFile`] only these are read, into `memory` (see [`TensorFile.read_values`]).
    """
    if isinstance(tensors, TensorFile):
        return tensors.shape_of(key), partial(tensors.read_values, key, memory=memory)
    tensor = tensors[key]
    values = tensor.reshape(-1)
    return tensor.shape, lambda start, end: values[start:end]


class _OpenFile:
    def __init__(self, path: str, descriptor: int):
        self.descriptor = descriptor
        size = os.fstat(descriptor).st_size
        try:
            header = read_header(size, lambda start, length: os.pread(descriptor, length, start))
            self.tensors = _parse_header(header, size)
        except ValueError as error:
            raise ValueError(f"`{path}` {error}.") from error

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=128)
def _open_file(path: str, stamp: tuple[int, int]) -> _OpenFile:
    return _OpenFile(path, os.open(path, os.O_RDONLY))


# The updates of a round have equal headers; a large adapter's takes milliseconds to parse, and 200 kB.
_parse_header = lru_cache(maxsize=8)(parse_header)


def close_files() -> None:
    """Close the files that [`TensorFile`]s have open; a deleted file takes up the disk until it is closed."""
    _open_file.cache_clear()
