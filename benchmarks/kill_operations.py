# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Kill the owner's process, or a worker, of a whole federation at each of its own operations on files, and resume it.

    python -m benchmarks.kill_operations [--kills 40] [--seed 0] [--csv kill_operations.csv]

Three rounds of four clients with two workers and the owner's process, which exports the base, estimates a control variate and merges.
One run without a kill counts the operations of each process (see `tests/faults.py`). Then there is one trial for each, in an order
that the seed draws: the first such process that comes to that operation dies in it, and the run is resumed where that ended it.
`--kills` stops earlier. Counted are rounds that were committed and are gone, files with other bits than those of the undisturbed run
(where a worker's death costs a client its part in a round, the rounds before are compared), runs that fail, and files that are left. A
worker's death must cost one client one round at most, and never the run. Exit code 1 if anything is wrong. Trials that the file has
are not run again.

The undisturbed run starts all processes as users do. In the trials they are forked, which saves each of them 6 s of imports; that the
bits are the same is compared in each trial.
"""

import argparse
import csv
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

from peft import LoraConfig
from transformers import AutoModelForCausalLM

from fedlpp_hf import FederatedConfig, FederatedTrainer, RoundStore
from fedlpp_hf.server import loop
from tests.child_faults import Plan, fork_processes
from tests.helpers import ROOT, build_model, make_rows
from tests.kill_cases import read_federation


VICTIMS = {"owner": "owner", "worker": "client worker"}  # and what the library calls them
_ROUNDS = 3
_SECONDS = 300  # for a run, which takes five on an idle core
_MEMORY = re.compile(r"_clients/\w+/round-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class Trial:
    """One kill, and what was wrong afterwards. `kind` is that of the operation, and empty if nobody came to it."""

    victim: str
    operation: int
    kind: str
    starts: int
    left_out: int
    lost_rounds: int
    differing: int
    failed_runs: int
    files_left: int

    @property
    def is_clean(self) -> bool:
        wrong = self.lost_rounds or self.differing or self.failed_runs or self.files_left
        return not wrong and self.left_out <= (self.victim == "worker")


def work(directory: Path) -> None:
    """The federation, begun or resumed."""
    loop.secrets = SimpleNamespace(token_hex=lambda count: "f0" * count)  # it names clients' memories
    rows = make_rows(16, clients=4)
    args = FederatedConfig(
        str(directory / "out"), num_rounds=_ROUNDS, partition="client", max_steps=2, per_device_train_batch_size=4,
        learning_rate=1e-2, update_bits=4, client_workers=2, broadcast="never", control_variate=1, use_cpu=True,
        disable_tqdm=True, report_to=[],
    )  # fmt: skip
    trainer = FederatedTrainer(
        str(directory / "full"), args, train_dataset=rows, eval_dataset=rows, owner_dataset=rows,
        model_class=AutoModelForCausalLM,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=RoundStore(args.output_dir).latest() is not None)


def serve() -> None:
    """Fork a federation for each line that comes in, and answer with its exit code."""
    import matplotlib.figure  # noqa: F401  # for the report, once instead of in each fork

    gc.collect()
    gc.freeze()  # else each fork walks all that was imported
    while line := sys.stdin.readline():
        pid = os.fork()
        if not pid:
            directory, plan = json.loads(line)
            fork_processes(plan and Plan(**plan))
            begin(Path(directory))
            return  # the interpreter ends as always, and with it what holds the processes
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def begin(directory: Path) -> None:
    """Work in a process that is there for nothing else."""
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    tempfile.tempdir = os.environ["TMPDIR"] = str(directory / "tmp")
    signal.alarm(_SECONDS)  # one that hangs has failed
    work(directory)


class Runs:
    """Starts federations below `root`, after one that nothing disturbs, and compares them with it."""

    def __init__(self, root: Path):
        self.root, self.count = root, 0
        build_model("llama").save_pretrained(root / "full")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = environment | {"PYTHONPATH": os.pathsep.join(places)}
        whole = self.make_directory()
        if subprocess.run(self._command(str(whole)), env=self._environment, timeout=_SECONDS).returncode:
            raise RuntimeError(f"The undisturbed run failed: {(whole / 'log').read_text()[-2000:]}")
        self.expected, self.files = read_federation(whole), _list_files(whole)
        self._server = subprocess.Popen(
            self._command(), env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        self._server.communicate()

    def make_directory(self) -> Path:
        """Where the next federation works: always the same place, which files name."""
        directory = self.root / "work"
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "tmp").mkdir(parents=True)
        (directory / "full").symlink_to(self.root / "full")
        return directory

    def run(self, directory: Path, plan: Plan | None = None) -> int:
        """Begin or resume a federation of forked processes; its exit code."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps([str(directory), plan and asdict(plan)]) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def make_plan(self, directory: Path, victim: str = "", at: int | None = None) -> Plan:
        """What happens to the processes of a federation in `directory`."""
        self.count += 1
        plan = Plan(str(directory), str(self.root / f"plan-{self.count}"), victim and VICTIMS[victim], at)
        Path(plan.folder).mkdir()
        return plan

    def count_operations(self) -> dict[str, list[list[str]]]:
        """By victim, the kinds of operations of each such process in order, in a run without a kill."""
        plan = self.make_plan(directory := self.make_directory())
        if self.run(directory, plan):
            raise RuntimeError(f"A run without a kill failed: {(directory / 'log').read_text()[-2000:]}")
        return {victim: plan.read_operations(name) for victim, name in VICTIMS.items()}

    def try_kill(self, victim: str, operation: int) -> Trial:
        """Kill once, resume, compare."""
        plan = self.make_plan(directory := self.make_directory(), victim, operation)
        code, starts, failed = self.run(directory, plan), 1, 0
        kept = find_records(directory)
        failed += bool(code) and victim == "worker"
        while code and starts < 4:
            code, starts = self.run(directory), starts + 1
            failed += bool(code)
        found = self.compare(directory, kept)
        trial = Trial(victim, operation, plan.read_kind(), starts, failed_runs=failed, **found)
        if not trial.is_clean:
            print((directory / "log").read_text()[-4000:], file=sys.stderr)
        return trial

    def compare(self, directory: Path, kept: dict[Path, int]) -> dict[str, int]:
        """What is wrong with a federation that has ended; `kept` are the records that were there after the kill."""
        records = RoundStore(directory / "out").records()
        out = [record["round"] for record in records for _ in record["rejected"]]
        expected, found = self.expected, read_federation(directory)
        if out:
            first = min(out)
            expected = {
                name: value
                for name, value in expected.items()
                if (place := _round_of(name)) is not None and place < first
            }
            found = {name: found.get(name) for name in expected}
        left = _list_files(directory)
        left.subtract(self.files)
        return {
            "left_out": len(out),
            "lost_rounds": _ROUNDS + 1 - len(records) + len(kept.items() - find_records(directory).items()),
            "differing": sum(expected.get(name) != found.get(name) for name in expected.keys() | found.keys()),
            "files_left": sum(count for count in left.values() if count > 0),
        }

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "benchmarks.kill_operations", "--work", *arguments]


def find_records(directory: Path) -> dict[Path, int]:
    """The records of committed rounds, and when they were written: a round that is run again is lost."""
    found = (directory / "out" / "_federation" / "rounds").glob("*/round.json")
    return {path: path.stat().st_mtime_ns for path in found}


def _round_of(name: str) -> int | None:
    """The round that a file of a federation's state is of."""
    found = re.match(r"_federation/rounds/round-(\d{5})/", name)
    return int(found[1]) if found else None


def _list_files(directory: Path) -> Counter[str]:
    """What a federation wrote, and scratch directories. A client that was left out of a round has no memory of it."""
    found = [str(path.relative_to(directory)) for path in (directory / "out").rglob("*")]
    found += [f"tmp/{path.name.rpartition('-')[0]}" for path in (directory / "tmp").glob("fedlpp-*")]
    return Counter(_MEMORY.sub("a client's memory", name) for name in found)


def render(trials: list[Trial]) -> str:
    """A table of what was found, by victim."""
    lines = [
        "| killed | kills | clients left out of a round | rounds lost | files that differ | runs that failed | files left |",
        "|---|---|---|---|---|---|---|",
    ]
    names = ("left_out", "lost_rounds", "differing", "failed_runs", "files_left")
    for victim in (*VICTIMS, ""):
        mine = [trial for trial in trials if victim in ("", trial.victim)]
        counts = [sum(bool(trial.kind) for trial in mine), *(sum(getattr(t, name) for t in mine) for name in names)]
        lines.append(f"| {victim or 'together'} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def read_trials(file: Path) -> list[Trial]:
    """Those that an earlier run has appended."""
    kinds = {entry.name: entry.type for entry in fields(Trial)}
    with file.open(newline="", encoding="utf-8") as stream:
        return [Trial(**{key: kinds[key](value) for key, value in line.items()}) for line in csv.DictReader(stream)]


def append_trial(file: Path, trial: Trial) -> None:
    """A line more, at once: whoever stops the harness loses one trial."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [entry.name for entry in fields(Trial)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(trial))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=sys.maxsize, help="by default one at each operation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--csv", type=Path, help="append a line for each trial, and leave out those that are in the file"
    )
    parser.add_argument("--work", nargs="?", const="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        begin(Path(arguments.work)) if arguments.work else serve()
        return
    trials = read_trials(arguments.csv) if arguments.csv is not None and arguments.csv.is_file() else []
    done = {(trial.victim, trial.operation) for trial in trials}
    operations = []
    with tempfile.TemporaryDirectory(prefix="kill-operations-") as folder, closing(Runs(Path(folder))) as runs:
        for victim, found in runs.count_operations().items():
            longest = max(found, key=len)
            print(f"{victim}: {len(longest)} operations", dict(Counter(longest).most_common()), flush=True)
            operations += [(victim, number) for number in range(len(longest))]
        random.Random(arguments.seed).shuffle(operations)
        for victim, number in operations[: arguments.kills]:
            if (victim, number) not in done:
                trials.append(runs.try_kill(victim, number))
                print(trials[-1], flush=True)
                if arguments.csv is not None:
                    append_trial(arguments.csv, trials[-1])
    print(f"\n{render(trials)}\n\n{len(trials)} of {len(operations)} operations, seed {arguments.seed}")
    raise SystemExit(not all(trial.is_clean for trial in trials))


if __name__ == "__main__":
    main()
