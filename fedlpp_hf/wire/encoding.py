# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The bytes of a message: safetensors and JSON, never pickle.

A message is a valid safetensors file whose metadata carry one JSON object, with a SHA-256 over the object and every
tensor: a payload that was changed on its way is rejected. (A digest is no signature: the transport authenticates.)
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..tensors.codebooks import check_bits, packed_size
from ..tensors.files import DTYPES
from ..tensors.headers import MAX_HEADER_BYTES
from ..tensors.quantization import QuantizedTensor, dequantize


SCHEMA_VERSION = 2
_METADATA_KEY = "fedlpp_hf"
_CODES, _SCALES = "#codes", "#scales"
_ORDER = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FLOATS = _ORDER[1:]
_MAX_DIMENSIONS = 64  # torch's own limit
LARGEST = 2**63 - 1  # what a reader's arithmetic and torch's shapes can hold

Payload = Mapping[str, torch.Tensor | QuantizedTensor]


@dataclass(frozen=True, slots=True)
class MessageLimit:
    """How large a message may be, in bytes, and the header in it, which costs many times its size to parse."""

    num_bytes: int
    header_bytes: int


def restore_tensors(payload: Payload) -> dict[str, torch.Tensor]:
    """The tensors that a payload stands for, float32."""
    return {
        key: dequantize(value) if isinstance(value, QuantizedTensor) else value.float()
        for key, value in payload.items()
    }


def _parse_json(text: str | bytes) -> Any:
    """JSON without a key twice: readers differ in which of the two they take."""

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("it has a key twice")
        return values

    return json.loads(text, object_pairs_hook=collect)


def encode_message(kind: str, header: dict[str, Any], payload: Payload) -> bytes:
    """Encode JSON values and tensors as one safetensors file that says its `kind` and carries a checksum.

    Equal messages make equal bytes.

    Raises:
        ValueError: for a plain tensor of another dtype than a message can hold, or two tensors of one stored name.
    """
    body, tensors = _lay_out(kind, header, payload)
    body["sha256"] = compute_digest(body, tensors)
    return save(tensors, metadata={_METADATA_KEY: json.dumps(body, sort_keys=True)})


def measure_message(kind: str, header: dict[str, Any], payload: Payload) -> int:
    """The length of [`encode_message`]'s bytes, without making them: a simulation sends nothing, and still counts."""
    body, tensors = _lay_out(kind, header, payload)
    body["sha256"] = "0" * 64
    entries: dict[str, Any] = {"__metadata__": {_METADATA_KEY: json.dumps(body, sort_keys=True)}}
    position = 0
    # safetensors orders tensors by dtype, the widest first, then by name.
    for name in sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name].dtype), name.encode())):
        tensor, start = tensors[name], position
        position += tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, position],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + position


def _lay_out(kind: str, header: dict[str, Any], payload: Payload) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A message's JSON object, without its checksum, and its tensors by the name that they are stored under."""
    tensors: dict[str, torch.Tensor] = {}
    quantized = {}
    for key, value in payload.items():
        if isinstance(value, QuantizedTensor):
            stored = {key + _CODES: value.codes, key + _SCALES: value.scales}
            quantized[key] = [list(value.shape), value.bits, value.block_size]
        else:
            stored = {key: value.contiguous()}
            _check_plain(stored, kind)
        if twice := stored.keys() & tensors.keys():
            raise ValueError(f"The {kind} has two tensors that would be stored as `{min(twice)}`; rename `{key}`.")
        tensors |= stored
    return {"kind": kind, "schema": SCHEMA_VERSION, **header, "quantized": quantized}, tensors


def decode_message(
    kind: str, data: bytes, limit: MessageLimit | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor | QuantizedTensor]]:
    """The inverse of [`encode_message`].

    Raises:
        ValueError: if `data` is no intact message of that kind, or above the limit.
    """
    if limit is not None and len(data) > limit.num_bytes:
        raise ValueError(f"The {kind} has {len(data)} bytes; expected at most {limit.num_bytes}.")
    if len(data) < 8 or (header_size := struct.unpack("<Q", data[:8])[0]) > min(len(data) - 8, MAX_HEADER_BYTES):
        raise ValueError(f"The {kind} of {len(data)} bytes is truncated, or its header claims more than there is.")
    if limit is not None and header_size > limit.header_bytes:
        raise ValueError(f"The {kind} has a header of {header_size} bytes; expected at most {limit.header_bytes}.")
    try:
        body = _parse_json(_parse_json(data[8 : 8 + header_size])["__metadata__"][_METADATA_KEY])
        tensors = load(data)
    # RuntimeError: nesting too deep for the parser, or an empty tensor whose other sizes are absurd.
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"The {kind} is no message of this library ({type(error).__name__}: {error}).") from error
    if not isinstance(body, dict) or body.get("kind") != kind:
        raise ValueError(f"Expected a {kind}; the message says it is something else.")
    if body.get("schema") != SCHEMA_VERSION:
        raise ValueError(
            f"The {kind} has schema {body.get('schema')!r}; this version of fedlpp_hf speaks {SCHEMA_VERSION}. "
            "Install the same version on both sides."
        )
    if body.pop("sha256", None) != compute_digest(body, tensors):
        raise ValueError(f"The {kind}'s checksum is wrong: it was changed or damaged on its way.")
    return body, _restore_quantized(body.get("quantized"), tensors, kind)


def _restore_quantized(
    quantized: Any, tensors: dict[str, torch.Tensor], kind: str
) -> dict[str, torch.Tensor | QuantizedTensor]:
    payload: dict[str, torch.Tensor | QuantizedTensor] = {}
    try:
        for key, (shape, bits, block_size) in quantized.items():
            codes, scales = tensors.pop(key + _CODES), tensors.pop(key + _SCALES)
            if not (
                type(shape) is list
                and all(type(size) is int and 0 <= size <= LARGEST for size in shape)
                # Not of the sizes alone: a zero among them would hide what no tensor can be viewed as.
                and len(shape) <= _MAX_DIMENSIONS
                and math.prod(max(size, 1) for size in shape) <= LARGEST
                and type(bits) is int
                and type(block_size) is int
                and block_size > 0
                and codes.dtype == torch.uint8
                and codes.dim() == scales.dim() == 1
                and scales.dtype in _FLOATS
                and codes.numel() == packed_size(check_bits(bits), count := math.prod(shape))
                and scales.numel() == -(-count // block_size)
            ):
                raise ValueError(f"the quantized tensor `{key}` is malformed")
            payload[key] = QuantizedTensor(codes, scales, tuple(shape), bits, block_size)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The {kind}'s quantized tensors can't be read ({error}).") from error
    if twice := payload.keys() & tensors.keys():
        raise ValueError(f"The {kind} has `{min(twice)}` twice: as a plain and as a quantized tensor.")
    _check_plain(tensors, kind)
    return payload | tensors


def _check_plain(tensors: Mapping[str, torch.Tensor], kind: str) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype not in _ORDER:  # bytes are what compressed updates are made of
            raise ValueError(
                f"The {kind}'s `{key}` is of {tensor.dtype}; expected float64, 32, 16, bfloat16 or uint8."
            )


def compute_digest(body: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of a message's JSON object and tensors, in hexadecimal."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"\0{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
