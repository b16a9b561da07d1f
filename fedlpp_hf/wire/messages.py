# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What crosses the wire: tasks to clients, updates to the server. Safetensors and JSON, never pickle.

A message is a valid safetensors file whose metadata carry one JSON object, with a SHA-256 over the object and every
tensor, so that a payload changed on its way is not accepted. (A digest is no signature: the transport authenticates.)
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..tensors.files import MAX_HEADER_BYTES
from ..tensors.quantization import QuantizedTensor, check_bits, dequantize, packed_size


SCHEMA_VERSION = 1
_METADATA_KEY = "fedlpp_hf"
_CODES, _SCALES = "#codes", "#scales"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_DIMENSIONS = 64  # torch's own limit
_LARGEST = 2**63 - 1  # what a reader's arithmetic and torch's shapes can hold

Payload = Mapping[str, torch.Tensor | QuantizedTensor]


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """How a client trains and what it sends, as far as that is the server's to say. Zero turns an option off.

    `rule` says which factors are trained (see [`trainable_factors`]); `rank` is the client's own, lower one; `proximal_mu` is
    FedProx's; `clip_norm` bounds the update; the rest is for [`compress_update`]. `scaffold` comes with a control in the task.
    """

    rule: str = "fedavg"
    rank: int = 0
    proximal_mu: float = 0.0
    scaffold: bool = False
    clip_norm: float = 0.0
    update_bits: int = 32
    update_block_size: int = 256
    update_density: float = 1.0
    error_feedback: bool = False


@dataclass(frozen=True, slots=True)
class ClientTask:
    """Server → client: what to start from and how to train in one round.

    `proxy` is the quantized adapter by key (plain tensors where the federation runs unquantized), or None where nothing
    is broadcast and the client starts from its untouched base. `round` counts from 1. `control` is SCAFFOLD's, quantized
    like the proxy.
    """

    federation_id: str
    round: int
    num_rounds: int
    client_id: str
    seed: int
    base_fingerprint: str
    proxy: Payload | None
    options: LocalOptions = LocalOptions()
    control: Payload = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        header = {name: getattr(self, name) for name in _TASK_TYPES} | {"broadcast": self.proxy is not None}
        payload = dict(self.proxy or {}) | {_CONTROL + key: value for key, value in self.control.items()}
        return encode_message("task", header | {"options": asdict(self.options)}, payload)

    @classmethod
    def from_bytes(cls, data: bytes) -> "ClientTask":
        """
        Raises:
            ValueError: if `data` is no intact task.
        """
        header, payload = decode_message("task", data)
        values = _read_fields(header, _TASK_TYPES, "task")
        options = header.get("options")
        if not isinstance(options, dict) or options.keys() != _OPTION_TYPES.keys():
            raise ValueError(
                f"The task's `options` are {options!r:.100}; expected those of this version of fedlpp_hf."
            )
        proxy = {key: value for key, value in payload.items() if not key.startswith(_CONTROL)}
        control = {key.removeprefix(_CONTROL): value for key, value in payload.items() if key.startswith(_CONTROL)}
        return cls(
            **values,
            proxy=proxy if header.get("broadcast") else None,
            options=LocalOptions(**_read_fields(options, _OPTION_TYPES, "task's options")),
            control=control,
        )

    def proxy_tensors(self) -> dict[str, torch.Tensor] | None:
        """The proxy as float32 tensors."""
        return None if self.proxy is None else restore_tensors(self.proxy)


@dataclass(frozen=True, slots=True)
class ClientFailure:
    """In place of an update: a client that failed, or whose answer could not be read, and why."""

    client_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """Client → server: Δ = θ − (what the client started from), by key of the adapter, with the client's metrics.

    A metric may be NaN or infinite (a run that logged no loss says so); a value of `delta` may not, but it is the server
    that refuses it.
    """

    federation_id: str
    round: int
    client_id: str
    base_fingerprint: str
    num_examples: int
    delta: Payload
    metrics: dict[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        header = {name: getattr(self, name) for name in _UPDATE_TYPES} | {"metrics": self.metrics}
        return encode_message("update", header, self.delta)

    @classmethod
    def from_bytes(cls, data: bytes) -> "ClientUpdate":
        """
        Raises:
            ValueError: if `data` is no intact update.
        """
        header, payload = decode_message("update", data)
        metrics = header.get("metrics")
        if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
            raise ValueError(f"The update's `metrics` are {metrics!r:.100}; expected a mapping of names to numbers.")
        return cls(**_read_fields(header, _UPDATE_TYPES, "update"), delta=payload, metrics=metrics)


_TASK_TYPES: dict[str, type] = {
    "federation_id": str,
    "round": int,
    "num_rounds": int,
    "client_id": str,
    "seed": int,
    "base_fingerprint": str,
}
_OPTION_TYPES: dict[str, type] = {entry.name: type(entry.default) for entry in fields(LocalOptions)}
_CONTROL = "control:"
_UPDATE_TYPES: dict[str, type] = {
    "federation_id": str,
    "round": int,
    "client_id": str,
    "base_fingerprint": str,
    "num_examples": int,
}


def restore_tensors(payload: Payload) -> dict[str, torch.Tensor]:
    """The tensors that a payload stands for, float32."""
    return {
        key: dequantize(value) if isinstance(value, QuantizedTensor) else value.float()
        for key, value in payload.items()
    }


def _read_fields(header: dict[str, Any], types: dict[str, type], kind: str) -> dict[str, Any]:
    for name, expected in types.items():
        value = header.get(name)
        if type(value) is not expected and (expected, type(value)) != (float, int):  # who sets 1.0 may write 1
            raise ValueError(f"The {kind}'s `{name}` is {value!r:.100}; expected a value of type {expected.__name__}.")
        if isinstance(value, int) and not 0 <= value <= _LARGEST:
            raise ValueError(f"The {kind}'s `{name}` is {value!r:.40}; expected a number from 0 to 2**63 - 1.")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(
                f"The {kind}'s `{name}` is {value!r:.100}; half a surrogate pair can't be printed or stored."
            )
    return {name: header[name] for name in types}


def _is_number(value: Any) -> bool:
    # JSON's integers have no bound, and Python's do not become floats beyond 1e308. A bool is an int, too.
    return type(value) is float or (type(value) is int and abs(value) <= _LARGEST)


def _parse_json(text: str | bytes) -> Any:
    """JSON without a key twice: readers differ in which of the two they take."""

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("it has a key twice")
        return values

    return json.loads(text, object_pairs_hook=collect)


def encode_message(kind: str, header: dict[str, Any], payload: Payload) -> bytes:
    """JSON values and tensors as one safetensors file that says its `kind` and carries a checksum.

    Equal messages make equal bytes.

    Raises:
        ValueError: for a plain tensor of another dtype than a message can hold, or two tensors that would be stored under one name.
    """
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
    body = {"kind": kind, "schema": SCHEMA_VERSION, **header, "quantized": quantized}
    body["sha256"] = _digest(body, tensors)
    return save(tensors, metadata={_METADATA_KEY: json.dumps(body, sort_keys=True)})


def decode_message(kind: str, data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor | QuantizedTensor]]:
    """The inverse of [`encode_message`].

    Raises:
        ValueError: if `data` is no intact message of that kind.
    """
    if len(data) < 8 or (header_size := struct.unpack("<Q", data[:8])[0]) > min(len(data) - 8, MAX_HEADER_BYTES):
        raise ValueError(f"A {kind} of {len(data)} bytes is truncated, or its header claims more than there is.")
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
    if body.pop("sha256", None) != _digest(body, tensors):
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
                and all(type(size) is int and 0 <= size <= _LARGEST for size in shape)
                # Not of the sizes alone: a zero among them would hide what no tensor can be viewed as.
                and len(shape) <= _MAX_DIMENSIONS
                and math.prod(max(size, 1) for size in shape) <= _LARGEST
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
        if tensor.dtype not in (*_FLOATS, torch.uint8):  # bytes are what compressed updates are made of
            raise ValueError(
                f"The {kind}'s `{key}` is of {tensor.dtype}; expected float64, 32, 16, bfloat16 or uint8."
            )


def _digest(body: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"\0{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
