# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Where the audit's seconds go, beside those of the run that it audits: a recipe with its config.

    OMP_NUM_THREADS=1 python -m benchmarks.audit_parts [--config recipes/configs/quickstart.yaml] [flags of the recipe]

What the config needs must be there (`make quickstart` makes it for the default). Seconds are those of the processor, on one thread,
so that neither other work nor cores that are left idle count: an owner that works beside the clients takes as long as one that comes
after them. With `client_workers` the parts of the workers are not told apart.
"""

import argparse
import functools
import importlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from fedlpp_hf.audit import audit
from fedlpp_hf.trainer.federated import FederatedMixin
from fedlpp_hf.trainer.local_run import LocalRunMixin


RUN, AUDIT = "run", "audit"
# Functions by the part they are, within the run and within the audit.
PARTS: tuple[tuple[Any, str, str], ...] = (
    (FederatedMixin, "train", RUN),
    (audit, "audit_federation", AUDIT),
    (LocalRunMixin, "train_client", "training"),
    (audit, "measure_rows", "losses on the audit's rows"),
    (LocalRunMixin, "evaluate_proxy", "metrics on all evaluation rows"),
)
OWNER, REST = "the owner's process", "all else"


class Clock:
    """Seconds of the processor by (`run` or `audit`, part); what is within a part's call counts for the innermost."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str]] = Counter()
        self._open: list[tuple[str, str]] = []
        self._last = self._read()

    def _read(self) -> tuple[float, float]:
        children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        return time.process_time(), sum(times.user + times.system for times in children)

    def _count(self) -> None:
        now = self._read()
        if self._open:
            side, part = self._open[-1]
            self.found[side, part] += now[0] - self._last[0]
            self.found[side, OWNER] += now[1] - self._last[1]
        self._last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._count()
        side = self._open[-1][0] if self._open else RUN
        self._open.append((name, REST) if name in (RUN, AUDIT) else (side, name))
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def follow(self, holder: Any, name: str, part: str) -> None:
        """Count the calls of `holder.name` for `part`."""
        function = getattr(holder, name)

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        setattr(holder, name, counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/sequence_classification.py"))
    parser.add_argument("--config", default="recipes/configs/quickstart.yaml")
    parser.add_argument("--output_dir", default="out/audit_parts")
    options, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    clock = Clock()
    for holder, name, part in PARTS:
        clock.follow(holder, name, part)
    sys.path.insert(
        0, str(options.recipe.parent.resolve())
    )  # of the owner's process, too, which imports compute_metrics
    sys.argv = [str(options.recipe), "--config", options.config, "--output_dir", options.output_dir, *flags]
    sys.argv += ["--overwrite", "--audit", "True", "--disable_tqdm", "True"]
    importlib.import_module(options.recipe.stem).main()

    sums = {side: sum(seconds for key, seconds in clock.found.items() if key[0] == side) for side in (RUN, AUDIT)}
    print("| part | run, seconds | share | audit, seconds | share |\n|---|---|---|---|---|")
    for part in [*(part for _, _, part in PARTS if part not in sums), OWNER, REST]:
        cells = [f"{clock.found[side, part]:.1f} | {clock.found[side, part] / sums[side]:.0%}" for side in sums]
        print(f"| {part} | {' | '.join(cells)} |")
    print(f"| in all | {sums[RUN]:.1f} | | {sums[AUDIT]:.1f} | |")
    clients = sums[RUN] - clock.found[RUN, OWNER]
    print(
        f"\nThe audit costs {sums[AUDIT] / sums[RUN]:.2f} × the run, {sums[AUDIT] / clients:.2f} × what is not the owner's of it."
    )


if __name__ == "__main__":
    main()
