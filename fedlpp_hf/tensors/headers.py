# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Headers of safetensors files, strictly checked: which tensors there are, and where. They need no torch."""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class StoredType:
    """A dtype in a file: torch's name for it, and the bytes of a value."""

    name: str
    itemsize: int


STORED = {
    "F64": StoredType("float64", 8),
    "F32": StoredType("float32", 4),
    "F16": StoredType("float16", 2),
    "BF16": StoredType("bfloat16", 2),
    "F8_E4M3": StoredType("float8_e4m3fn", 1),
    "F8_E5M2": StoredType("float8_e5m2", 1),
    "I64": StoredType("int64", 8),
    "I32": StoredType("int32", 4),
    "I16": StoredType("int16", 2),
    "I8": StoredType("int8", 1),
    "U8": StoredType("uint8", 1),
    "BOOL": StoredType("bool", 1),
}
# Safetensors allow 100 MB, which take Python's JSON gigabytes and half a minute. 100,000 tensors take a third of this.
MAX_HEADER_BYTES = 32_000_000


@dataclass(frozen=True, slots=True)
class TensorRange:
    """A tensor in a file: bytes `start` to `stop`, counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype_name(self) -> str:
        """Torch's name of the dtype, or the file's where torch has none."""
        return STORED[self.dtype].name if self.dtype in STORED else self.dtype

    @property
    def torch_dtype(self) -> "torch.dtype":
        """Torch's dtype; a ValueError where it has none."""
        import torch

        if self.dtype not in STORED:
            raise ValueError(f"`{self.name}` has the dtype {self.dtype}; expected one of {', '.join(STORED)}.")
        return getattr(torch, STORED[self.dtype].name)


def read_header(size: int, read: Callable[[int, int], bytes]) -> bytes:
    """Read the header of a safetensors file of `size` bytes, with the eight bytes before it, by `read(offset, length)`.

    Raises:
        ValueError: if the header claims more than there is, or is too large to be read. The message goes on after the file's name.
    """
    if size < 8 or (length := struct.unpack("<Q", read(0, 8))[0]) > size - 8:
        raise ValueError(f"has {size} bytes: it is truncated or not a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"has a header of {length} bytes; expected at most {MAX_HEADER_BYTES}")
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
        known = STORED.get(tensor.dtype)
        if tensor.start != position or (known and length != math.prod(tensor.shape) * known.itemsize):
            raise ValueError(f"has a header that gives `{tensor.name}` the wrong bytes")
        position = tensor.stop
    if position != size:
        raise ValueError(f"has {size} bytes, but its header describes {position}: it is truncated or was written to")
    return {tensor.name: tensor for tensor in tensors}


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0
