# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Feed damaged and made-up messages to the readers: `python -m benchmarks.fuzz_messages [count] [seed]`.

Two promises are put to the test. A message that was changed on its way is refused with a ValueError, or is equal to the
one that was sent (another way to write the same JSON). And whatever a client makes up, with a checksum that is right,
costs the server a ValueError at most, and no more memory than it sent. Exit code 1 if one is broken.
"""

import contextlib
import json
import random
import resource
import struct
import sys
import time
from collections import Counter

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from fedlpp_hf.messages import ClientTask, ClientUpdate, LocalOptions, _digest, restore_tensors
from fedlpp_hf.quantization import quantize


MEMORY_LIMIT = 512 * 2**20  # over what the process holds at the start
ABSURD = [0, 1, -1, 2, 255, 2**31, 2**62, 2**63, 2**64, 10**30, 0.5, 1e308, True, None, "", "F64", "U8", [], {}, [[0]]]


def make_messages() -> list[ClientTask | ClientUpdate]:
    generator = torch.Generator().manual_seed(0)
    plain = {f"layers.{n}.lora_{f}.weight": torch.randn(4, 6, generator=generator) for n in range(3) for f in "AB"}
    quantized = {
        key: quantize(value, bits, 8) for (key, value), bits in zip(plain.items(), (1, 2, 3, 4, 8, 2), strict=True)
    }
    control = {"layers.0.lora_A.weight": torch.ones(4, 6)}
    task = ClientTask("federation", 3, 10, "client-1", 7, "ab" * 32, quantized, LocalOptions(clip_norm=2.0), control)
    update = ClientUpdate(
        "federation", 3, "client-1", "ab" * 32, 12, plain | {"head": torch.ones(3).half()}, {"loss": 1.5}
    )
    return [task, ClientTask("federation", 1, 10, "client-1", 7, "ab" * 32, None), update]


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
            body["sha256"] = _digest(body, load(_join(header, buffer)))
    header["__metadata__"]["fedlpp_hf"] = json.dumps(body, sort_keys=True)
    return _join(header, buffer)


def _join(header, buffer: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + buffer


def limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_LIMIT, resource.RLIM_INFINITY))


def run(count: int, seed: int) -> int:
    chance = random.Random(seed)
    messages = make_messages()
    encoded = [message.to_bytes() for message in messages]
    outcomes: dict[str, Counter[str]] = {}
    broken = 0
    limit_memory()
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for number in range(count):
        which = chance.randrange(len(messages))
        data, sent = encoded[which], messages[which]
        way = chance.random()
        if way < 0.5:
            kind, changed = mutate_bytes(data, encoded[which - 1], chance)
        else:
            kind = "header" if way < 0.75 else "forged"
            changed = rewrite_header(data, chance, kind == "forged")
        try:
            received = type(sent).from_bytes(changed)
            for name in ("delta", "proxy", "control"):
                restore_tensors(getattr(received, name, None) or {})
            # Equal messages make equal bytes, and these hold all there is of a message.
            outcome = "equal" if received.to_bytes() == data else "accepted"
        except ValueError:
            outcome = "refused"
        except Exception as error:
            outcome = f"CRASHED with {type(error).__name__}"
        outcomes.setdefault(kind, Counter())[outcome] += 1
        if outcome.startswith("CRASHED") or (outcome == "accepted" and kind != "forged"):
            broken += 1
            print(f"mutation {number} ({kind}): {outcome}: {changed[:200]!r}", file=sys.stderr)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    for kind, counts in sorted(outcomes.items()):
        print(f"{kind:10}", ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    print(
        f"{count} mutations, seed {seed}, {time.perf_counter() - began:.0f} s, memory +{grown:.0f} MiB; "
        f"{broken} broken promises"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(run(*(arguments + [30_000, 0][len(arguments) :])))
