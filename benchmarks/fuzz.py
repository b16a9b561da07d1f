# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Feed damaged and made-up files and messages to all readers: `python -m benchmarks.fuzz [--mutations 100000] [--seed 0]`.

Each mutation must be refused by a clear ValueError or OSError, or change nothing, or, where there is no digest, be read as what it
says: within 10 seconds and 1 GiB. Readers run in forked children, so that a crash is an outcome, too. Exit code 1 if one promise
is broken.
"""

import argparse
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzz_messages import MessageFuzz


MEMORY_LIMIT = 2**30  # over what a process holds at the start
TIME_LIMIT = 10.0  # seconds for one; what is slow is no crash, but a server that hangs
_BATCH = 200
# Out of 1000. Merging takes 50 times as long as the others.
SHARES = {
    "messages": 250, "manifest": 110, "base": 60, "base, unverified": 60, "packed base": 40, "round": 130, "federation": 60,
    "adapter": 80, "adapter to merge": 10, "checkpoint": 45, "suspect": 45, "mark key": 45, "certificates": 15,
    "client's ca.crt": 20, "node's key": 10, "client's settings": 10, "client's memory": 10,
}  # fmt: skip


@dataclass
class Findings:
    """Of one target: outcomes by kind of mutation, the slowest, and what is broken."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    grown: int = 0  # bytes, of a child
    broken: list[str] = field(default_factory=list)


def fuzz(target: str, fuzzer: Any, count: int, seed: int) -> Findings:
    """Mutate one target `count` times; a mutation is a function of (seed, target, number)."""
    findings, number = Findings(), 0
    while number < count:
        number = _run_batch(target, fuzzer, range(number, min(number + _BATCH, count)), seed, findings)
    return findings


def _run_batch(target: str, fuzzer: Any, numbers: range, seed: int, findings: Findings) -> int:
    """Run a batch in a child; returns the number after the last one that ended, or killed it."""
    ours, childs = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ours)
        _serve(target, fuzzer, numbers, seed, lambda line: os.write(childs, (json.dumps(line) + "\n").encode()))
    os.close(childs)
    done, pending, cause = numbers.start, b"", "the process died"
    with os.fdopen(ours, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], TIME_LIMIT * 3)[0]:
                os.kill(pid, signal.SIGKILL)
                cause = f"it took over {TIME_LIMIT * 3:.0f} s"
            data = pipe.read(1 << 16)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                kind, outcome, seconds, grown = json.loads(line)
                done += 1
                findings.kinds[kind] += 1
                findings.slowest, findings.grown = max(findings.slowest, seconds), max(findings.grown, grown)
                if seconds > TIME_LIMIT:
                    outcome = f"BROKEN: it took {seconds:.1f} s"
                if outcome.startswith("BROKEN"):
                    findings.broken.append(f"{target}, mutation {done - 1} ({kind}): {outcome}")
                    outcome = "BROKEN"
                findings.outcomes[outcome] += 1
    status = os.waitpid(pid, 0)[1]
    if done < numbers.stop:
        findings.broken.append(f"{target}, mutation {done}: {cause} (status {status})")
        findings.outcomes["BROKEN"] += 1
        done += 1
    return done


def _serve(target: str, fuzzer: Any, numbers: range, seed: int, say: Callable[[Any], Any]) -> None:
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_LIMIT, resource.RLIM_INFINITY))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in numbers:
            chance, began = random.Random(f"{seed} {target} {number}"), time.perf_counter()
            try:
                kind, outcome = fuzzer.try_one(chance)
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                kind, outcome = (
                    "?",
                    f"BROKEN: {type(error).__name__}: {error}"[:500] + f" at {place.filename}:{place.lineno}",
                )
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
            say([kind, outcome, time.perf_counter() - began, grown])
    finally:
        os._exit(0)


def run(count: int, seed: int, targets: Sequence[str]) -> dict[str, Findings]:
    """Share `count` mutations out over the targets."""
    torch.set_num_threads(1)
    whole = sum(SHARES[name] for name in targets)
    found = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        made = {}
        if set(targets) - {"messages"}:
            from benchmarks.fuzz_files import FileFuzz, make_targets  # needs the extra `flower`

            made = make_targets(Path(directory) / "made")
        for name in targets:
            fuzzer: Any = (
                MessageFuzz() if name == "messages" else FileFuzz(*made[name], Path(directory) / "place" / name)
            )
            found[name] = fuzz(name, fuzzer, max(count * SHARES[name] // whole, 1), seed)
            print(render({name: found[name]}).splitlines()[-1], file=sys.stderr, flush=True)
            for text in found[name].broken[:20]:
                print(text, file=sys.stderr, flush=True)
    return found


def render(found: dict[str, Findings]) -> str:
    """A table of what was found, by target."""
    outcomes = ("refused", "equal", "read", "admitted", "BROKEN")
    lines = [
        "| target | mutations | " + " | ".join(outcomes) + " | slowest | memory |",
        "|---" * (len(outcomes) + 4) + "|",
    ]
    for name, findings in found.items():
        counts = " | ".join(str(findings.outcomes[outcome]) for outcome in outcomes)
        total = sum(findings.outcomes.values())
        lines.append(
            f"| {name} | {total} | {counts} | {findings.slowest * 1e3:.0f} ms | +{findings.grown / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=list(SHARES), default=list(SHARES))
    arguments = parser.parse_args()
    began = time.perf_counter()
    found = run(arguments.mutations, arguments.seed, arguments.targets)
    print(render(found))
    broken = sum(len(findings.broken) for findings in found.values())
    print(
        f"\n{arguments.mutations} mutations, seed {arguments.seed}, {time.perf_counter() - began:.0f} s; {broken} broken promises"
    )
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
