# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Kill everything that writes files, at every kind of operation: `python -m benchmarks.kills [--kills 1000] [--seed 0]`.

Each trial is one to three kills, power cuts or full disks (see `tests/faults.py`) in one case of `tests/kill_cases.py`, then the
rest of the work without any; the result is compared bit for bit with work that nothing disturbed. Exit code 1 if a round is
lost, a bit differs, a resume fails or a file is left. With `--csv` trials that are in the file are not run again.
"""

import argparse
import csv
import random
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, fields
from pathlib import Path

import torch

from tests.kill_cases import CASES
from tests.trials import Outcome, Trials


# Out of 100 trials. Rounds first: they are what a federation can't get again.
SHARES = {
    "rounds": 50,
    "training": 2,
    "export": 10,
    "transfer": 10,
    "merge": 8,
    "certificates": 4,
    "authority": 4,
    "settings": 3,
    "memory": 5,
    "marks": 4,
}


def choose_case(seed: int, number: int, names: list[str]) -> tuple[str, random.Random]:
    """The case of a trial, and what decides the rest of it: functions of (seed, number) alone."""
    chance = random.Random(f"{seed} {number}")
    return chance.choices(names, [SHARES[name] for name in names])[0], chance


def run(kills: int, seed: int, names: list[str], file: Path | None = None) -> list[Outcome]:
    """Trials until there were as many kills; returns those that were run now."""
    torch.set_num_threads(1)
    done = _read(file) if file is not None else {}
    total, outcomes, trials, number = 0, [], dict[str, Trials](), 0
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        while total < kills:
            name, chance = choose_case(seed, number, names)
            if number in done:
                total += done[number]
            else:
                if name not in trials:
                    trials[name] = Trials(CASES[name], Path(root))
                outcome = trials[name].run(number, chance)
                outcomes.append(outcome)
                total += outcome.kills
                if file is not None:
                    _append(file, outcome)
                if not outcome.is_clean:
                    print(outcome, file=sys.stderr, flush=True)
            number += 1
    return outcomes


def render(outcomes: list[Outcome]) -> str:
    """A table of what was found, by case."""
    rows = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.case].append(outcome)
        rows["all"].append(outcome)
    rows["all"] = rows.pop("all", [])
    lines = [
        "| case | trials | kills | rounds lost | bits that differ | resumes that failed | files left |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        sums = [len(found), sum(o.kills for o in found), sum(max(o.lost, 0) for o in found)]
        sums += [
            sum(bool(o.differing) for o in found),
            sum(bool(o.failed) for o in found),
            sum(len(o.left) for o in found),
        ]
        lines.append(f"| {name} | " + " | ".join(map(str, sums)) + " |")
    return "\n".join(lines)


def _read(file: Path) -> dict[int, int]:
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as stream:
        return {int(row["number"]): int(row["kills"]) for row in csv.DictReader(stream)}


def _append(file: Path, outcome: Outcome) -> None:
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Outcome)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(outcome))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--csv", type=Path, help="append a line for each trial, and go on where the file ends")
    arguments = parser.parse_args()
    began = time.perf_counter()
    outcomes = run(arguments.kills, arguments.seed, arguments.cases, arguments.csv)
    print(render(outcomes))
    kills = sum(outcome.kills for outcome in outcomes)
    print(f"\n{kills} kills in {len(outcomes)} trials, seed {arguments.seed}, {time.perf_counter() - began:.0f} s")
    sys.exit(not all(outcome.is_clean for outcome in outcomes))


if __name__ == "__main__":
    main()
