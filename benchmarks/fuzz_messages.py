# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Damaged and made-up messages for their readers; `python -m benchmarks.fuzz --targets messages` runs them.

Two promises are put to the test. A message that was changed on its way is refused with a ValueError, or is equal to the
one that was sent (another way to write the same JSON). And whatever a client makes up, with a checksum that is right,
costs the server a ValueError at most, no time to speak of, and no more memory than it sent: of an update, compressed or
not, that the round admits, every tensor has the adapter's key and shape, is finite float32, and is within the norm that
the server allows.
"""

import contextlib
import copy
import dataclasses
import json
import math
import random
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from fedlpp_hf import FederatedConfig
from fedlpp_hf.server.admission import Admission
from fedlpp_hf.tensors.quantization import QuantizedTensor, quantize
from fedlpp_hf.wire.compression import GAPS, VALUES, compress_update
from fedlpp_hf.wire.encoding import compute_digest, restore_tensors
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate, LocalOptions


MAX_NORM = 100.0
FORGED = ("forged header", "forged tensors", "made up")
ABSURD = [0, 1, -1, 2, 255, 2**31, 2**62, 2**63, 2**64, 10**30, 0.5, 1e308, True, None, "", "F64", "U8", [], {}, [[0]]]


Message = ClientTask | ClientUpdate


def make_messages() -> list[tuple[Message, ClientTask | None]]:
    """Messages, and with an update the task that it answers."""
    generator = torch.Generator().manual_seed(0)
    quantized = {
        f"layers.{place}": quantize(torch.randn(4, 6, generator=generator), bits, 8)
        for place, bits in enumerate((1, 2, 3, 4, 8, 2))
    }
    task = ClientTask("federation", 3, 10, "client-1", 7, "ab" * 32, quantized, LocalOptions(clip_norm=2.0))
    empty = dataclasses.replace(task, proxy=None)
    adapter = make_adapter()
    updates = [
        (task, {key: tensor.half() if "head" in key else tensor for key, tensor in adapter.items()}),
        (empty, adapter),
        (task, compress_update(adapter, bits=4, block_size=8)[0]),
        (task, compress_update(adapter, bits=4, block_size=8, density=0.1)[0]),
        (task, compress_update(adapter, density=0.1)[0]),
        (empty, compress_update(adapter, bits=2, block_size=8, density=0.3)[0]),
    ]
    return [
        (task, None),
        (empty, None),
        *(
            (ClientUpdate("federation", 3, "client-1", "ab" * 32, 12, delta, {"loss": 1.5, "steps": 4}), asked)
            for asked, delta in updates
        ),
    ]


def make_adapter() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"lora_A": (4, 96), "lora_B": (24, 4)}
    adapter = {
        f"base_model.model.layers.{n}.q.{factor}.weight": torch.randn(shape, generator=generator) / 10
        for n in range(2)
        for factor, shape in shapes.items()
    }
    adapter["base_model.model.head.weight"] = torch.randn(3, 5, generator=generator)
    return adapter


def make_admissions() -> list[Admission]:
    """The rounds that take updates: one bounds their norm, one does not."""
    adapter = make_adapter()
    return [
        Admission(FederatedConfig("unused", use_cpu=True, max_update_norm=bound), adapter, {"client-1": 12}, Path())
        for bound in (MAX_NORM, None)
    ]


def mutate_bytes(data: bytes, other: bytes, chance: random.Random) -> tuple[str, bytes]:
    kind = chance.choice(("flip", "overwrite", "truncate", "splice", "insert", "delete"))
    here, there = sorted(chance.choices(range(len(data)), k=2))
    changed = bytearray(data)
    if kind == "flip":
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "overwrite":
        changed[here] = chance.randrange(256)
    elif kind == "truncate":
        del changed[here:]
    elif kind == "splice":
        changed[here:there] = other[here:there]
    elif kind == "insert":
        changed[here:here] = chance.randbytes(chance.randint(1, 16))
    else:
        del changed[here : here + chance.randint(1, 16)]
    return kind, bytes(changed)


def mutate_json(value, chance: random.Random):
    """`value` with one place in it changed: replaced, dropped, doubled, or put under another key."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        kind = chance.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return value | {chance.choice([key + "#codes", "x", *value]): value[key]}
        return value | {key: mutate_json(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], mutate_json(value[place], chance), *value[place + chance.choice((0, 1, 1)) :]]
    if type(value) is int and chance.random() < 0.4:
        return value + chance.choice((-8, -4, -1, 1, 4, 8, 2**32))
    return chance.choice(ABSURD)


def rewrite_header(data: bytes, chance: random.Random, forge: bool) -> bytes:
    """The message with something else in its header or its JSON; with `forge` and, if it can be, the right checksum."""
    size = struct.unpack("<Q", data[:8])[0]
    header, buffer = json.loads(data[8 : 8 + size]), data[8 + size :]
    body = json.loads(header["__metadata__"]["fedlpp_hf"])
    if chance.random() < 0.5:
        header = mutate_json(header, chance)
    else:
        body = mutate_json(body, chance)
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        return _join(header, buffer)
    if forge and isinstance(body, dict):
        body.pop("sha256", None)
        # What is not even safetensors must be refused without a checksum, too.
        with contextlib.suppress(SafetensorError, KeyError, RuntimeError, TypeError, ValueError):
            body["sha256"] = compute_digest(body, load(_join(header, buffer)))
    header["__metadata__"]["fedlpp_hf"] = json.dumps(body, sort_keys=True)
    return _join(header, buffer)


def rewrite_tensors(data: bytes, chance: random.Random) -> bytes:
    """The message with a few bytes of its tensors changed, and the right checksum."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header, buffer = json.loads(data[8:start]), bytearray(data[start:])
    for _ in range(chance.randint(1, 4)):
        buffer[chance.randrange(len(buffer))] = chance.choice((0, 127, 128, 254, 255, chance.randrange(256)))
    body = json.loads(header["__metadata__"]["fedlpp_hf"])
    del body["sha256"]
    body["sha256"] = compute_digest(body, load(_join(header, bytes(buffer))))
    header["__metadata__"]["fedlpp_hf"] = json.dumps(body, sort_keys=True)
    return _join(header, bytes(buffer))


def make_up_update(update: ClientUpdate, chance: random.Random) -> bytes:
    """An update that a client of this library could have written, had it wanted to."""
    delta = dict(update.delta)
    for _ in range(chance.randint(1, 3)):
        if not delta:
            break
        key, other = chance.choice(list(delta)), chance.choice(list(delta))
        kind = chance.random()
        if kind < 0.1:
            del delta[key]
        elif kind < 0.2:
            plain = key.removesuffix(GAPS).removesuffix(VALUES)
            delta[chance.choice((plain, plain + GAPS, plain + VALUES, key + VALUES, "x"))] = copy.deepcopy(delta[key])
        elif kind < 0.3:
            delta[key], delta[other] = delta[other], delta[key]
        elif isinstance(value := delta[key], QuantizedTensor):
            delta[key] = mutate_quantized(value, chance)
        else:
            delta[key] = mutate_tensor(value, chance)
    return dataclasses.replace(update, delta=delta).to_bytes()


def mutate_tensor(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    kind = chance.choice(("dtype", "shape", "length", "empty", "value", "value"))
    if kind == "dtype":
        return tensor.to(chance.choice((torch.float64, torch.float16, torch.bfloat16, torch.uint8)))
    if kind == "shape":
        return tensor.reshape(chance.choice(((-1,), (1, -1), (-1, 1), tuple(reversed(tensor.shape)))))
    if kind == "length":
        return tensor.reshape(-1).repeat(2)[: chance.randrange(2 * tensor.numel() + 1)]
    if kind == "empty":
        return tensor.new_empty(chance.choice(((), (0,), (0, 2**40), (4, 0)))).zero_()
    wide = tensor.to(chance.choice((torch.float64, torch.float32)) if tensor.is_floating_point() else tensor.dtype)
    if not tensor.numel():
        return wide
    value = chance.choice(
        (math.nan, math.inf, 1e300, 3e38, 1e18, 65536.0) if wide.is_floating_point() else (0, 254, 255)
    )
    wide = wide.clone()
    wide.view(-1)[chance.randrange(wide.numel())] = torch.tensor(value, dtype=torch.float64)
    return wide


def mutate_quantized(value: QuantizedTensor, chance: random.Random) -> QuantizedTensor:
    part = chance.choice(("codes", "scales", "shape", "bits", "block_size", "again"))
    if part in ("codes", "scales"):
        return dataclasses.replace(value, **{part: mutate_tensor(getattr(value, part), chance)})
    if part == "shape":
        shapes = ((), (0,), (1, *value.shape), value.shape[::-1], (2**31, 2**31), (math.prod(value.shape) + 1,))
        return dataclasses.replace(value, shape=chance.choice(shapes))
    if part == "bits":
        return dataclasses.replace(value, bits=chance.choice((0, 1, 2, 3, 4, 5, 8, 32)))
    if part == "block_size":
        return dataclasses.replace(value, block_size=chance.choice((0, -1, 1, 7, 2**62)))
    # Consistent, and of another shape: what only the comparison with the adapter can refuse.
    shape = chance.choice(((1,), (4, 96), (24, 4), (24, 2), (2**16,)))
    return quantize(torch.ones(shape), chance.choice((1, 2, 3, 4, 8)), chance.choice((1, 8, 256)))


def mutate(sent: Message, data: bytes, other: bytes, chance: random.Random) -> tuple[str, bytes]:
    kind = chance.choice(("bytes", "header", *FORGED))
    if kind == "bytes":
        return mutate_bytes(data, other, chance)
    if kind == "made up" and isinstance(sent, ClientUpdate):
        with contextlib.suppress(RuntimeError, ValueError):  # some can't be written
            return kind, make_up_update(sent, chance)
    if kind == "forged tensors" and (isinstance(sent, ClientUpdate) or sent.proxy):
        return kind, rewrite_tensors(data, chance)
    kind = "header" if kind == "header" else "forged header"
    return kind, rewrite_header(data, chance, kind == "forged header")


def _join(header, buffer: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + buffer


def receive(
    data: bytes, sent: Message, task: ClientTask | None, original: bytes, admission: Admission, forged: bool
) -> str:
    """What becomes of a message: `equal` to the one that was sent, only `read`, or `admitted`.

    Raises:
        ValueError: if it is refused.
        RuntimeError: if the server would have taken what it must not.
    """
    received = type(sent).from_bytes(data)
    if isinstance(received, ClientTask):
        restore_tensors(received.proxy or {})
    # Equal messages make equal bytes, and these hold all there is of a message.
    outcome = "equal" if received.to_bytes() == original else "read"
    if outcome == "read" and not forged:
        raise RuntimeError("a message that was changed on its way was read")
    if task is None:
        return outcome
    delta = admission.open_update(received, task)
    for key, tensor in delta.items():
        expected = admission.shapes[key].shape
        if tensor.shape != expected or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise RuntimeError(f"admitted `{key}` {tuple(tensor.shape)} {tensor.dtype}")
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in delta.values()))
    if delta.keys() != admission.shapes.keys() or norm > (admission.args.max_update_norm or math.inf) * (1 + 1e-6):
        raise RuntimeError(f"admitted {sorted(delta)} of norm {norm}")
    return outcome if outcome == "equal" else "admitted"


class MessageFuzz:
    """All messages: mutates and receives them."""

    def __init__(self) -> None:
        self.messages, self.admissions = make_messages(), make_admissions()
        self.encoded = [message.to_bytes() for message, _ in self.messages]

    def try_one(self, chance: random.Random) -> tuple[str, str]:
        """The kind of a mutation, and `refused`, or what [`receive`] returns.

        Raises:
            RuntimeError: if the server would have taken what it must not.
        """
        which = chance.randrange(len(self.messages))
        sent, task = self.messages[which]
        kind, changed = mutate(sent, self.encoded[which], self.encoded[which - 1], chance)
        try:
            return kind, receive(
                changed, sent, task, self.encoded[which], chance.choice(self.admissions), kind in FORGED
            )
        except ValueError:
            return kind, "refused"
