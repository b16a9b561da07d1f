# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the server and its clients send each other: tasks to clients, updates to the server."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from .encoding import LARGEST, MessageLimit, Payload, decode_message, encode_message, measure_message, restore_tensors
from .text import make_printable


_MAX_STRING = 1000  # characters; a client's id is the longest
_MAX_METRICS, _MAX_METRIC_NAME = 100, 100
_ENVELOPE = {"kind", "schema", "quantized"}  # what every message's header has


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """How a client trains and what it sends, as far as the server decides. Zero turns an option off.

    Args:
        rule: Aggregation rule, which says what factors are trained (see [`trainable_keys`]).
        proximal_mu: Weight of FedProx's term.
        logit_adjustment: τ of [`adjust_logits`].
        clip_norm: Norm to which a longer update is scaled down.
        update_bits, update_block_size, update_density: As in [`compress_update`].
        share_noise, share_colluders: Noise that clients of a secure sum add in shares, as in [`NoiseShares`].
        share_delta: δ of the ε that clients note in their logs.
    """

    rule: str = "fedavg"
    proximal_mu: float = 0.0
    logit_adjustment: float = 0.0
    clip_norm: float = 0.0
    update_bits: int = 32
    update_block_size: int = 256
    update_density: float = 1.0
    share_noise: float = 0.0
    share_colluders: int = 0
    share_delta: float = 0.0


@dataclass(frozen=True, slots=True)
class ClientTask:
    """Server → client: what to start from and how to train in one round.

    Args:
        federation_id: Names the federation, in updates too.
        round: Number of the round, from 1.
        num_rounds: Rounds of the whole federation.
        client_id: The client that the task is for.
        seed: Of the local run: batches, dropout.
        base_fingerprint: Of the base that the client must hold.
        proxy: The quantized adapter by key (plain tensors where the federation runs unquantized), or None where nothing
            is broadcast: then the client starts from the untouched base, and continues from its own adapter.
        options: How to train and what to send.
        num_clients: Clients that a round asks, as the server says; 0 where it does not say. Like the next, it is
            a claim that no client can verify.
        noise_multiplier: Standard deviation of the noise that is added to the round's sum, as a multiple of the clip; 0 for
            none.
    """

    federation_id: str
    round: int
    num_rounds: int
    client_id: str
    seed: int
    base_fingerprint: str
    proxy: Payload | None
    options: LocalOptions = LocalOptions()
    num_clients: int = 0
    noise_multiplier: float = 0.0

    def to_bytes(self) -> bytes:
        return encode_message(*self._message())

    @property
    def num_bytes(self) -> int:
        """The length of [`to_bytes`], which is not called for it."""
        return measure_message(*self._message())

    def _message(self) -> tuple[str, dict[str, Any], Payload]:
        header = {name: getattr(self, name) for name in (*_TASK_TYPES, *_CLAIM_TYPES)}
        header["broadcast"] = self.proxy is not None
        return "task", header | {"options": asdict(self.options)}, self.proxy or {}

    @classmethod
    def from_bytes(cls, data: bytes) -> "ClientTask":
        """
        Raises:
            ValueError: if `data` is no intact task.
        """
        header, payload = decode_message("task", data)
        claims = {name: kind for name, kind in _CLAIM_TYPES.items() if name in header}  # older servers make none
        values = _read_fields(header, _TASK_TYPES | claims, "task")
        options = header.get("options")
        if not isinstance(options, dict) or options.keys() != _OPTION_TYPES.keys():
            raise ValueError(
                f"The task's `options` are {options!r:.100}; expected those of this version of fedlpp_hf."
            )
        broadcast = header.get("broadcast")
        if not isinstance(broadcast, bool) or (payload and not broadcast):
            raise ValueError(
                f"The task's `broadcast` is {broadcast!r:.100}, with {len(payload)} tensors of a proxy; expected "
                "true, or false and no tensors."
            )
        return cls(
            **values,
            proxy=payload if broadcast else None,
            options=LocalOptions(**_read_fields(options, _OPTION_TYPES, "task's options")),
        )

    @property
    def goes_on(self) -> bool:
        """Whether the client goes on from its own adapter: nothing is broadcast, in more than one round."""
        return self.proxy is None and self.num_rounds > 1

    def proxy_tensors(self) -> dict[str, torch.Tensor] | None:
        """The proxy as float32 tensors."""
        return None if self.proxy is None else restore_tensors(self.proxy)


@dataclass(frozen=True, slots=True)
class ClientFailure:
    """In place of an update: a client that failed, or gave an unreadable answer, and why, in one printable line."""

    client_id: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", make_printable(self.reason))


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """Client → server: Δ = θ − proxy, by key of the adapter, with the client's metrics. Where nothing is broadcast, Δ is the
    client's whole way from the base's own adapter.

    A metric may be NaN or infinite (a run that logged no loss says so); a value of `delta` may not, and the server rejects
    an update that has one.

    Args:
        federation_id, round, client_id, base_fingerprint: Those of the task.
        num_examples: Rows that the client trained on.
        delta: The update, plain or compressed.
        metrics: Numbers by name; `loss` and `steps` among them.
    """

    federation_id: str
    round: int
    client_id: str
    base_fingerprint: str
    num_examples: int
    delta: Payload
    metrics: dict[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return encode_message(*self._message())

    @property
    def num_bytes(self) -> int:
        """The length of [`to_bytes`], which is not called for it."""
        return measure_message(*self._message())

    def _message(self) -> tuple[str, dict[str, Any], Payload]:
        header = {name: getattr(self, name) for name in _UPDATE_TYPES} | {"metrics": self.metrics}
        return "update", header, self.delta

    @classmethod
    def from_bytes(cls, data: bytes, limit: MessageLimit | None = None) -> "ClientUpdate":
        """
        Raises:
            ValueError: if `data` is no intact update, or above the limit (see [`limit_update`]).
        """
        header, payload = decode_message("update", data, limit)
        if unknown := header.keys() - _ENVELOPE - _UPDATE_TYPES.keys() - {"metrics"}:
            raise ValueError(
                f"The update has {len(unknown)} fields that no update has, such as {min(unknown)!r:.100}."
            )
        metrics = header.get("metrics")
        if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
            raise ValueError(f"The update's `metrics` are {metrics!r:.100}; expected a mapping of names to numbers.")
        if len(metrics) > _MAX_METRICS:
            raise ValueError(f"The update has {len(metrics)} metrics; expected at most {_MAX_METRICS}.")
        for name in metrics:
            if not (0 < len(name) <= _MAX_METRIC_NAME and name.isprintable()):
                raise ValueError(
                    f"The update has a metric named {name!r:.100}; expected up to {_MAX_METRIC_NAME} printable characters."
                )
        return cls(**_read_fields(header, _UPDATE_TYPES, "update"), delta=payload, metrics=metrics)


def limit_update(adapter: Mapping[str, torch.Tensor]) -> MessageLimit:
    """How large an update of `adapter` can be, whatever its compression: twice what float32 would take, at the most."""
    # Kept values with their distances take 5 bytes each, beside an escape in 255; float64, which may be sent, takes 8.
    values = sum(8 * tensor.numel() for tensor in adapter.values())
    # A tensor is up to three entries, and one in the JSON in the header's JSON, where quotes and backslashes double.
    header = (1 << 16) + sum(8 * len(key.encode()) + 1000 for key in adapter)
    return MessageLimit(8 + header + values, header)


_TASK_TYPES: dict[str, type] = {
    "federation_id": str,
    "round": int,
    "num_rounds": int,
    "client_id": str,
    "seed": int,
    "base_fingerprint": str,
}
_CLAIM_TYPES: dict[str, type] = {"num_clients": int, "noise_multiplier": float}
_OPTION_TYPES: dict[str, type] = {entry.name: type(entry.default) for entry in fields(LocalOptions)}
_UPDATE_TYPES: dict[str, type] = {
    "federation_id": str,
    "round": int,
    "client_id": str,
    "base_fingerprint": str,
    "num_examples": int,
}


def _read_fields(header: dict[str, Any], types: dict[str, type], kind: str) -> dict[str, Any]:
    for name, expected in types.items():
        value = header.get(name)
        if type(value) is not expected and (expected, type(value)) != (float, int):  # who sets 1.0 may write 1
            raise ValueError(f"The {kind}'s `{name}` is {value!r:.100}; expected a value of type {expected.__name__}.")
        if isinstance(value, int) and not 0 <= value <= LARGEST:
            raise ValueError(f"The {kind}'s `{name}` is {value!r:.40}; expected a number from 0 to 2**63 - 1.")
        if isinstance(value, str) and len(value) > _MAX_STRING:
            raise ValueError(
                f"The {kind}'s `{name}` has {len(value)} characters; expected at most {_MAX_STRING}: {value!r:.100}."
            )
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(
                f"The {kind}'s `{name}` is {value!r:.100}; half a surrogate pair can't be printed or stored."
            )
    return {name: header[name] for name in types}


def _is_number(value: Any) -> bool:
    # JSON's integers have no bound, and Python's do not become floats beyond 1e308. A bool is an int, too.
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST)
