# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Kill the processes of a whole federation, by SIGKILL at moments drawn by the seed, and resume it.

    python -m benchmarks.kill_processes [--kills 60] [--seed 0] [--csv kill_processes.csv]

Three rounds of four clients with two workers and the owner's process, as `train()` starts them. In turn the victim is the trainer, the
owner's process, a worker, or all of them. Then the run is resumed until it ends. Counted are rounds that were committed and are
gone, bits that differ from the undisturbed run (where a worker dies, its client is left out of that round, so only the rounds before
are compared), resumes that fail, and files that are left in the temporary directory. Exit code 1 if there is one.
Operations on files are killed at in `benchmarks.kills` (one process) and `benchmarks.kill_operations` (the owner's process, workers).
Trials that the file has are not run again.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fedlpp_hf import FederatedConfig, FederatedTrainer, RoundStore
from tests.helpers import build_model, make_rows
from tests.kill_cases import read_digests


VICTIMS = ("trainer", "owner", "worker", "all")
_SCRATCH = {"owner": "fedlpp-owner-", "worker": "fedlpp-client-worker-"}


@dataclass(frozen=True, slots=True)
class Trial:
    """One kill: when, after how many seconds of the run, in which round, and what was wrong afterwards."""

    number: int
    victim: str
    seconds: float
    rounds_before: int
    starts: int
    lost_rounds: int
    differing: int
    failed_resumes: int
    files_left: int


def work(directory: Path) -> None:
    """The federation, begun or resumed."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    rows = make_rows(16, clients=4)
    args = FederatedConfig(
        str(directory / "out"), num_rounds=3, partition="client", max_steps=2, per_device_train_batch_size=4,
        learning_rate=1e-2, update_bits=4, client_workers=2, merge=False, use_cpu=True, disable_tqdm=True, report_to=[],
    )  # fmt: skip
    trainer = FederatedTrainer(
        str(directory / "full"), args, train_dataset=rows, eval_dataset=rows, model_class=AutoModelForCausalLM,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=RoundStore(args.output_dir).latest() is not None)


def start(directory: Path) -> subprocess.Popen:
    environment = os.environ | {"TMPDIR": str(directory / "tmp"), "OMP_NUM_THREADS": "1"}
    (directory / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kill_processes", "--work", str(directory)],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def find_children(pid: int, scratch: str) -> list[int]:
    """The processes below `pid` that hold a directory of that name open."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            names = [os.path.basename(os.readlink(descriptor)) for descriptor in (entry / "fd").iterdir()]
        except OSError:
            continue
        if parent == pid and any(name.startswith(scratch) for name in names):
            found.append(int(entry.name))
    return found


def kill(run: subprocess.Popen, victim: str, chance: random.Random) -> bool:
    """Kill it; False if there is none at this moment."""
    if run.poll() is not None:
        return False
    if victim == "all":
        os.killpg(run.pid, signal.SIGKILL)
    elif victim == "trainer":
        run.kill()
    else:
        children = find_children(run.pid, _SCRATCH[victim])
        if not children:
            return False
        os.kill(chance.choice(children), signal.SIGKILL)
    return True


def count_rounds(directory: Path) -> int:
    """The last committed round, by its files; -1 without one."""
    latest = RoundStore(directory / "out").latest()
    return -1 if latest is None else latest


def read_rounds(directory: Path) -> dict[str, str]:
    return {
        name: digest
        for name, digest in read_digests(directory / "out" / "_federation").items()
        if "/round-" in f"/{name}"
    }


def run_trial(number: int, seed: int, root: Path, whole: dict[str, str], length: float) -> Trial:
    """Kill once, resume, compare."""
    chance = random.Random(f"{seed} {number}")
    victim, seconds = VICTIMS[number % len(VICTIMS)], chance.uniform(0.3, length)
    directory = root / f"trial-{number}"
    directory.mkdir()
    (directory / "full").symlink_to(root / "full")
    run, began = start(directory), time.monotonic()
    while run.poll() is None and time.monotonic() - began < seconds:
        time.sleep(0.02)
    while not kill(run, victim, chance) and run.poll() is None:  # it has not started yet
        time.sleep(0.02)
    seconds, before, starts, failed = time.monotonic() - began, count_rounds(directory), 1, 0
    code = run.wait(timeout=300)
    while code and starts < 4:
        run, starts = start(directory), starts + 1
        code = run.wait(timeout=300)
        failed += bool(code)
    store = RoundStore(directory / "out")
    lost = (
        sum(not (store.round_dir(kept) / "round.json").is_file() for kept in range(before + 1))
        + 4
        - len(store.records())
    )
    compared = {
        name: digest
        for name, digest in whole.items()
        if victim != "worker" or int(name.partition("round-")[2][:5]) <= before
    }
    ours = read_rounds(directory)
    differing = sum(ours.get(name) != digest for name, digest in compared.items())
    left = sum(path.name.startswith("fedlpp-") for path in (directory / "tmp").iterdir())
    return Trial(number, victim, round(seconds, 2), before, starts, lost, differing, failed, left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
        return
    trials: list[Trial] = []
    if arguments.csv is not None and arguments.csv.is_file():
        kinds = {entry.name: entry.type for entry in fields(Trial)}
        with arguments.csv.open(newline="", encoding="utf-8") as file:
            trials = [
                Trial(**{key: kinds[key](value) for key, value in line.items()}) for line in csv.DictReader(file)
            ]
    with tempfile.TemporaryDirectory(prefix="kill-processes-") as folder:
        root = Path(folder)
        build_model("llama").save_pretrained(root / "full")
        (root / "whole").mkdir()
        (root / "whole" / "full").symlink_to(root / "full")
        began = time.monotonic()
        if start(root / "whole").wait(timeout=600):
            raise SystemExit(
                "The undisturbed run failed; run `python -m benchmarks.kill_processes --work DIR` to see why."
            )
        length, whole = time.monotonic() - began, read_rounds(root / "whole")
        if len(whole) != 16:  # four files for each of round 0 to 3
            raise SystemExit(f"The undisturbed run has {len(whole)} files of rounds; expected 16.")
        for number in range(len(trials), arguments.kills):
            trials.append(run_trial(number, arguments.seed, root, whole, length))
            print(trials[-1], flush=True)
            if arguments.csv is not None:
                with arguments.csv.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, [entry.name for entry in fields(Trial)], lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(asdict(trial) for trial in trials)
    print(
        "\n| killed | kills | rounds lost | files that differ | resumes that failed | files left |\n|---|---|---|---|---|---|"
    )
    for victim in (*VICTIMS, ""):
        mine = [trial for trial in trials if victim in ("", trial.victim)]
        counts = [
            sum(getattr(trial, name) for trial in mine)
            for name in ("lost_rounds", "differing", "failed_resumes", "files_left")
        ]
        print(f"| {victim or 'together'} | {len(mine)} | " + " | ".join(map(str, counts)) + " |")
    if any(trial.lost_rounds or trial.differing or trial.failed_resumes or trial.files_left for trial in trials):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
