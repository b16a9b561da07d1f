# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Tensors in safetensors files, read whole or part by part."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial

import torch

from .headers import STORED, TensorRange, parse_header, read_header


DTYPES = {name: getattr(torch, dtype.name) for name, dtype in STORED.items()}


def read_range(descriptor: int, buffer: memoryview, start: int) -> None:
    """Fill `buffer` from offset `start`."""
    count = done = os.preadv(descriptor, [buffer], start)
    while done < len(buffer):
        if not count:
            raise OSError(errno.EIO, "the file ended while it was read; is someone writing to it?")
        count = os.preadv(descriptor, [buffer[done:]], start + done)
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

    def read_values(self, key: str, start: int, end: int) -> torch.Tensor:
        """Read values of a tensor from one place to another, in memory order, into new memory."""
        file = self._open()
        tensor = file.tensors[key]
        size = tensor.torch_dtype.itemsize
        data = torch.empty((end - start) * size, dtype=torch.uint8)
        read_range(file.descriptor, data.numpy().data, tensor.start + start * size)
        return data.view(tensor.torch_dtype)

    def make_reader(self, key: str, memory: memoryview) -> "Read":
        """A function that reads values of a tensor into `memory`, where they are valid until it is used again.

        What does not change from one part to the next is found once.
        """
        file = self._open()
        tensor = file.tensors[key]
        size, dtype = tensor.torch_dtype.itemsize, tensor.torch_dtype
        part, values = memory[:0], torch.empty(0, dtype=dtype)

        def read(start: int, end: int) -> torch.Tensor:
            nonlocal part, values
            if end - start != len(values):
                part = memory[: (end - start) * size]
                values = torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)
            read_range(file.descriptor, part, tensor.start + start * size)
            return values

        return read

    def _open(self) -> "_OpenFile":
        return _open_file(self.path, self._stamp)


Read = Callable[[int, int], torch.Tensor]


def find_values(
    tensors: Mapping[str, torch.Tensor], key: str, memory: memoryview | None = None
) -> tuple[torch.Size, Read]:
    """A tensor's shape, and a function that returns its values from one place to another in memory order, as `(n,)`.

    From a [`TensorFile`] only these are read: into `memory` (see [`TensorFile.make_reader`]), or into new memory each time.
    """
    if isinstance(tensors, TensorFile):
        read = partial(tensors.read_values, key) if memory is None else tensors.make_reader(key, memory)
        return tensors.shape_of(key), read
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
