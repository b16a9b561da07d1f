# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Messages to send, and what they are made of."""

import json
import struct
from dataclasses import replace

import torch
from hypothesis import strategies as st

from fedlpp_hf.tensors.codebooks import BITS
from fedlpp_hf.tensors.quantization import quantize
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate, LocalOptions


KEY = "base_model.model.layers.0.q_proj.lora_A.weight"


def make_task(bits: int = 2) -> ClientTask:
    generator = torch.Generator().manual_seed(0)
    proxy = {KEY: quantize(torch.randn(3, 7, generator=generator), bits, 8), "b": torch.randn(2, generator=generator)}
    options = LocalOptions(rule="exact", clip_norm=1, update_bits=2, update_density=0.1)
    return ClientTask("f0", 3, 10, "klinik-ä", 1234, "ab" * 32, proxy, options)


def make_update(**changes) -> ClientUpdate:
    delta = {KEY: torch.arange(6.0).view(2, 3), "b": quantize(torch.tensor([1.0, -2.0]), 8)}
    return replace(ClientUpdate("f0", 3, "a", "ab" * 32, 5, delta, {"loss": 0.5, "steps": 7}), **changes)


def same(one, other) -> bool:
    """Bitwise equality of messages: dataclasses of tensors have no equality."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if hasattr(one, "__slots__"):
        return type(one) is type(other) and all(
            same(getattr(one, name), getattr(other, name)) for name in one.__slots__
        )
    return one == other or (one != one and other != other)


def read_parts(data: bytes) -> tuple[dict, dict, bytes]:
    """Header, the message's own JSON and the buffer of a message."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["fedlpp_hf"]), data[8 + size :]


def write_parts(header: dict | str, body: dict | str | None, buffer: bytes) -> bytes:
    if body is not None:
        text = body if isinstance(body, str) else json.dumps(body, sort_keys=True)
        header = {**header, "__metadata__": {"fedlpp_hf": text}}
    encoded = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(encoded)) + encoded + buffer


names = st.text(max_size=8)
values = st.lists(st.floats(width=32, allow_nan=False), max_size=9).map(torch.tensor)
payloads = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
    values
    | st.tuples(values, st.sampled_from(BITS)).filter(lambda v: v[0].isfinite().all()).map(lambda v: quantize(*v)),
    max_size=4,
)
