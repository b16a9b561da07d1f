# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The shards of a checkpoint: which tensors each file holds, checked against the index before anything is read."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..tensors.headers import MAX_HEADER_BYTES, TensorRange, parse_header, read_header
from .contents import check_link


WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its header as it is on disk, and its tensors in the order of their bytes."""

    file: str
    header: bytes
    tensors: dict[str, TensorRange]
    size: int


def read_shards(directory: Path, place: str = "") -> dict[str, Shard]:
    """Read the headers of all shards in a directory, by file name. The rest is [`collect_shards`]'s."""
    sizes = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    return collect_shards(directory, sizes, lambda file: read_shard(check_link(directory, directory / file)), place)


def collect_shards(
    directory: Path, sizes: Mapping[str, int], read: Callable[[str], Shard], place: str = ""
) -> dict[str, Shard]:
    """Find the shards of a checkpoint and read their headers, by file name.

    As in `from_pretrained`, a single file comes before an index.

    Args:
        directory: where the index is, if there is one.
        sizes: of the checkpoint's files, in bytes by name.
        read: a function from a file's name to its header.
        place: what errors call the checkpoint; by default the directory.

    Raises:
        ValueError: if there are no safetensors, a file is missing or damaged, or files and index differ.
    """
    place = place or str(directory)
    if WEIGHTS in sizes:
        return {WEIGHTS: read(WEIGHTS)}
    if WEIGHTS_INDEX not in sizes:
        pickles = sorted(file for file in sizes if file.endswith(".bin"))
        hint = f"It has `{pickles[0]}`, a pickle, which is never opened. " if pickles else ""
        raise ValueError(
            f"`{place}` has neither `{WEIGHTS}` nor `{WEIGHTS_INDEX}`. {hint}Load the model with transformers and "
            "`save_pretrained` it: that writes safetensors."
        )
    if sizes[WEIGHTS_INDEX] > MAX_HEADER_BYTES:
        raise ValueError(
            f"`{WEIGHTS_INDEX}` of `{place}` has {sizes[WEIGHTS_INDEX]} bytes; expected at most {MAX_HEADER_BYTES}."
        )
    weight_map = read_index(check_link(directory, directory / WEIGHTS_INDEX).read_bytes())
    shards = {}
    for file in sorted(set(weight_map.values())):
        if file not in sizes:
            raise ValueError(f"`{place}` has no `{file}`, which its index names. Download it again.")
        shards[file] = read(file)
    _check_index(shards, weight_map)
    return shards


def parse_shard(file: str, size: int, read: Callable[[int, int], bytes]) -> Shard:
    """Read the header of a safetensors file of `size` bytes by `read(offset, length)`.

    Raises:
        ValueError: if the header is damaged, or its tensors don't fill the file exactly, as in a truncated download.
    """
    try:
        header = read_header(size, read)
        return Shard(file, header, parse_header(header, size), size)
    except ValueError as error:
        raise ValueError(f"`{file}` {error}. Download it again.") from error


def read_shard(path: Path) -> Shard:
    """Read the header of a safetensors file on disk; errors are those of [`parse_shard`]."""
    with path.open("rb") as file:
        read = partial(_read_bytes, file.fileno())
        return parse_shard(path.name, path.stat().st_size, read)


def _read_bytes(descriptor: int, start: int, length: int) -> bytes:
    return os.pread(descriptor, length, start)


def read_index(text: str | bytes) -> dict[str, str]:
    """Read the index of a sharded checkpoint: the file of each tensor.

    Raises:
        ValueError: if it has no such map, or names files outside its directory.
    """
    try:
        weight_map = json.loads(text)["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"`{WEIGHTS_INDEX}` can't be read ({error}). Download it again.") from error
    for file in files:
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise ValueError(f"`{WEIGHTS_INDEX}` names the file {file!r}; expected safetensors files beside it.")
    return weight_map


def _check_index(shards: Mapping[str, Shard], weight_map: Mapping[str, str]) -> None:
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise ValueError(f"`{file}` has no `{name}`, but `{WEIGHTS_INDEX}` says it does. Download both again.")
    for shard in shards.values():
        for name in shard.tensors:
            if weight_map.get(name) != shard.file:
                raise ValueError(
                    f"`{shard.file}` has `{name}`, which `{WEIGHTS_INDEX}` does not place there. Download both again, or "
                    "load the model with transformers and `save_pretrained` it: this writes a fitting index."
                )
