# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Packing a base into one file to send, as small as its information; unpacked, it is bit-identical."""

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..tensors.atomic import sync_path
from ..tensors.codebooks import codebook, nf4_subset
from ..tensors.files import read_tensor
from ..tensors.packing import look_up
from ..tensors.quantization import restore_from_levels, round_to_levels
from ..tensors.scratch import working_directory
from ..tensors.threads import map_in_order, tensor_threads
from .contents import check_file_name
from .directory import new_base_directory
from .huffman import restore_codes, shrink_codes
from .manifest import BASE_MANIFEST, check_base, write_json
from .quantize import pack_nibbles, unpack_nibbles
from .shards import parse_shard, read_shard


# What reading made-up values raises; ArithmeticError: blocks of no values, or an infinite size.
_DAMAGE = (
    SafetensorError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError, json.JSONDecodeError,
)  # fmt: skip


def pack_base(base_dir: str | os.PathLike, file: str | os.PathLike) -> int:
    """Pack a base into one safetensors file. Returns its size in bytes.

    Codes take the bits of the export (ternary 1.6) or fewer ([`shrink_codes`]), scales the dtype of the full model. Every
    tensor is stored as bytes; the manifest, which the file carries, says what they mean. A few tensors are in memory at a
    time, as at export.

    Raises:
        ValueError: if the base differs from its manifest.
        RuntimeError: if a tensor would not come back bit-identical, or another process packs into `file`.
    """
    base_dir, file = Path(base_dir), Path(file)
    manifest = check_base(base_dir)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "base_manifest": json.dumps(manifest)}}
    with working_directory(file, "packing") as work:
        body, whole = work / "body", work / "whole"
        with body.open("wb") as stream, tensor_threads() as pool:
            for name, data in _pack_files(base_dir, manifest, pool):
                header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [stream.tell()] * 2}
                stream.write(data)
                header[name]["data_offsets"] = [header[name]["data_offsets"][0], stream.tell()]
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with whole.open("wb") as stream, body.open("rb") as source:
            stream.write(len(head).to_bytes(8, "little") + head)
            while chunk := source.read(1 << 20):
                stream.write(chunk)
        sync_path(whole)
        whole.replace(file)
        sync_path(work.parent)
    return file.stat().st_size


def unpack_base(file: str | os.PathLike, base_dir: str | os.PathLike, *, overwrite: bool = False) -> dict[str, Any]:
    """Restore the base that [`pack_base`] packed, and check it. Returns its manifest.

    Raises:
        ValueError: if the file is not a packed base, or is damaged; `base_dir` stays as it was.
    """
    try:
        with (
            safe_open(file, "pt") as packed,
            new_base_directory(Path(base_dir), overwrite) as directory,
            tensor_threads() as pool,
        ):
            manifest = json.loads((packed.metadata() or {})["base_manifest"])
            entries = {entry["name"]: entry for entry in manifest["tensors"]}
            for name in manifest["files"]:
                check_file_name(name)
                (directory / name).parent.mkdir(exist_ok=True)
                with (directory / name).open("wb") as stream:
                    if not name.endswith(".safetensors"):
                        stream.write(_to_bytes(packed.get_tensor(f"file:{name}")))
                        continue
                    header = _to_bytes(packed.get_tensor(f"header:{name}"))
                    stream.write(header)
                    size = manifest["files"][name]["bytes"]
                    keys = parse_shard(name, size, partial(_take, header)).tensors
                    for data in map_in_order(pool, lambda key: _unpack_tensor(key, packed, entries), keys):
                        stream.write(data)
            write_json(directory / BASE_MANIFEST, manifest)
            return check_base(directory)
    except _DAMAGE as error:
        raise ValueError(f"`{file}` is not a packed base, or it is damaged ({error!r}). Send it again.") from error


def read_packed_manifest(file: str | os.PathLike) -> dict[str, Any]:
    """The manifest in the file that [`pack_base`] wrote; whether the tensors fit it is checked where they are unpacked.

    Raises:
        ValueError: if the file is not a packed base, or is truncated.
    """
    try:
        with safe_open(file, "pt") as packed:
            return json.loads((packed.metadata() or {})["base_manifest"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"`{file}` is not a packed base, or it is damaged ({error!r}). Delete it.") from error


def _pack_files(base_dir: Path, manifest: dict[str, Any], pool: ThreadPoolExecutor) -> Iterator[tuple[str, bytes]]:
    entries = {entry["name"]: entry for entry in manifest["tensors"]}

    def pack(item: tuple[str, torch.Tensor]) -> dict[str, bytes]:
        key, tensor = item
        packed = _pack_tensor(key, tensor, entries)
        if _unpack_tensor(key, packed, entries) != _to_bytes(tensor):
            raise RuntimeError(f"`{key}` does not survive packing; please report it with the model's name.")
        return packed

    for name in manifest["files"]:
        if not name.endswith(".safetensors"):
            yield f"file:{name}", (base_dir / name).read_bytes()
            continue
        shard = read_shard(base_dir / name)
        yield f"header:{name}", shard.header
        tensors = ((key, read_tensor(base_dir / name, tensor)) for key, tensor in shard.tensors.items())
        for packed in map_in_order(pool, pack, tensors):
            yield from packed.items()


def _take(data: bytes, start: int, length: int) -> bytes:
    return data[start : start + length]


def _pack_tensor(key: str, tensor: torch.Tensor, entries: dict[str, Any]) -> dict[str, bytes]:
    entry = entries.get(key)
    weight = entries.get(key.removesuffix(".absmax"))
    if entry is not None and entry["kind"] == "linear4bit" and entry["bits"] < 4:
        places = torch.zeros(16, dtype=torch.uint8)
        places[list(nf4_subset(entry["bits"]))] = torch.arange(len(nf4_subset(entry["bits"])), dtype=torch.uint8)
        codes = look_up(places, unpack_nibbles(tensor, entry["shape"]))
        return {key: shrink_codes(codes, entry["bits"])}
    if entry is not None and entry["kind"] == "linear8bit":
        return {key: shrink_codes(tensor.view(torch.uint8).reshape(-1), 8)}
    if entry is not None and entry["kind"] == "codebook":
        # The largest magnitude of a block is one of its values, so quantizing again finds the same scale and codes.
        codes, scales = round_to_levels(tensor, codebook(entry["bits"]), entry["block_size"], name=key)
        return {key: shrink_codes(codes, entry["bits"]), f"{key}.scales": _to_bytes(scales.to(tensor.dtype))}
    if weight is not None and weight["kind"] == "linear4bit" and tensor.dtype == torch.float32:
        narrow = tensor.to(getattr(torch, weight["source_dtype"]))
        return {key: _to_bytes(narrow if torch.equal(narrow.float(), tensor) else tensor)}
    return {key: _to_bytes(tensor)}


def _unpack_tensor(key: str, packed: Any, entries: dict[str, Any]) -> bytes:
    """Restore the bytes of a shard's tensor from `packed`, a mapping to bytes or an open safetensors file."""

    def read(name: str) -> bytes:
        return packed[name] if isinstance(packed, dict) else _to_bytes(packed.get_tensor(name))

    entry = entries.get(key)
    weight = entries.get(key.removesuffix(".absmax"))
    if entry is not None and entry["kind"] == "linear4bit" and entry["bits"] < 4:
        subset = torch.tensor(nf4_subset(entry["bits"]), dtype=torch.uint8)
        codes = restore_codes(read(key), entry["bits"], math.prod(entry["shape"]))
        return _to_bytes(pack_nibbles(look_up(subset, codes)))
    if entry is not None and entry["kind"] == "linear8bit":
        return _to_bytes(restore_codes(read(key), 8, math.prod(entry["shape"])))
    if entry is not None and entry["kind"] == "codebook":
        dtype = getattr(torch, entry["dtype"])
        codes = restore_codes(read(key), entry["bits"], math.prod(entry["shape"]))
        scales = _to_tensor(read(f"{key}.scales"), dtype)
        if len(scales) != -(-len(codes) // entry["block_size"]):
            raise ValueError(f"`{key}` has {len(scales)} scales for {len(codes)} values; send the file again.")
        return _to_bytes(restore_from_levels(codes, scales, codebook(entry["bits"]), entry["block_size"], dtype))
    if weight is not None and weight["kind"] == "linear4bit" and key != weight["name"]:
        blocks = -(-weight["shape"][0] * weight["shape"][1] // weight["block_size"])
        narrow = getattr(torch, weight["source_dtype"])
        if len(read(key)) == blocks * narrow.itemsize:  # else they are float32, or the bytes of nested scales
            return _to_bytes(_to_tensor(read(key), narrow).float())
    return read(key)


def _to_tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
