# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Measure what Flower adds to a round, compared to the same round in one process, with warm trainers or without.

    python -m benchmarks.flower [--clients 2] [--rounds 10] [--cold]

Server and clients run on this machine as users start them, over TLS with node keys. The model is a Llama of 2 layers, so
training takes almost no time and transport nearly all. The first round, in which trainers start, is left out. All
clients share this machine's cores, unlike in a real federation, and any other load on it counts. It counts less for the
seconds of the processor, which are those of Linux (`/proc`).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from fedlpp_hf.flower.certificates import make_certificates, make_node_key
from fedlpp_hf.flower.loading import load_rows, load_trainer


TASK = """
from dataclasses import dataclass

from peft import LoraConfig
from transformers import AutoModelForCausalLM

from fedlpp_hf import FederatedConfig, FederatedTrainer


@dataclass
class TaskArguments:
    rank: int = 4


def make_trainer(task: TaskArguments, args: FederatedConfig, model, train_dataset):
    lora = LoraConfig(r=task.rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return FederatedTrainer(
        model, args, train_dataset=train_dataset, peft_config=lora, model_class=AutoModelForCausalLM
    )
"""


def prepare(directory: Path, clients: list[str], rounds: int) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(directory / "full")
    make_certificates(directory / "server", ["127.0.0.1", "localhost"])
    (directory / "keys").mkdir()
    for client in clients:
        ids = torch.randint(1, 64, (16, 12)).tolist()
        Dataset.from_dict({"input_ids": ids, "labels": ids}).to_json(directory / f"{client}.jsonl")
        make_node_key(directory / client)
        shutil.copy(directory / client / "node.pub", directory / "keys" / f"{client}.pub")
    (directory / "bench_task.py").write_text(TASK)
    options = {
        "trainer": "bench_task.py:make_trainer",
        "num_rounds": rounds,
        "num_clients": len(clients),
        "max_steps": 2,
    }
    options |= {"full_model": str(directory / "full"), "merge": False, "use_cpu": True, "disable_tqdm": True}
    (directory / "federation.yaml").write_text(yaml.safe_dump(options | {"report_to": "none"}))
    return directory / "federation.yaml"


PROCESSES = {
    "SuperLink": "fedlpp_hf.flower.superlink",
    "SuperNodes": "fedlpp_hf.flower.supernode",
    "ClientApps": "fedlpp_hf.flower.superexec",
    "trainers": "fedlpp_hf.flower.trainer_process",
    "ServerApp": "flwr-serverapp",
    "owner's process": "fedlpp_hf.processes.child",
    "SuperLink's SuperExec": "flower-superexec",
}


def read_processors(directory: Path) -> dict[str, float]:
    """Seconds of the processor that each kind of Flower's processes with files in `directory` has used, ended ones included."""
    kinds: dict[int, str | None] = {}
    parents, seconds = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            pid, fields = int(process.name), (process / "stat").read_text().rsplit(")", 1)[1].split()
            parents[pid], seconds[pid] = int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
            if f"FLWR_HOME={directory}" in (process / "environ").read_text(errors="replace"):
                command = (process / "cmdline").read_text(errors="replace")
                kinds[pid] = next((kind for kind, word in PROCESSES.items() if word in command), None)
        except OSError:
            continue  # it has ended
    found = dict.fromkeys(PROCESSES, 0.0)
    for pid, used in seconds.items():
        # What has just ended has no environment any more, and is not yet counted with its parent.
        if (kind := kinds.get(pid) or kinds.get(parents[pid])) is not None:
            found[kind] += used
    return found


def run_over_flower(
    directory: Path, config: Path, clients: list[str], port: int, cold: bool
) -> tuple[int, dict[str, float]]:
    """Run the federation; returns the peak memory of the ServerApp in bytes, and seconds of the processor a round by process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedlpp_hf.cli.main"]

    def start(side: str, *options: str) -> subprocess.Popen:
        with open(directory / "log", "a") as log:
            options = (side, "--config", str(config), *options)
            return subprocess.Popen([*command, *options], cwd=directory, env=environment, stdout=log, stderr=log)

    options = ["--state_dir", "server", "--client_keys", "keys", "--port", str(port), "--output_dir", "flower"]
    server = start("server", *options)
    others = []
    for client in clients:
        options = ["--data", f"{client}.jsonl", "--state_dir", client, "--cache_dir", f"{client}/bases"]
        options += ["--server", f"127.0.0.1:{port}", "--certificate", "server/ca.crt", *(["--cold"] if cold else [])]
        others.append(start("client", *options))
    peak, looks = 0, []
    rounds = directory / "flower" / "_federation" / "rounds"
    while server.poll() is None:
        peak = max(peak, read_peak_memory(directory / "server" / "server.pid"))
        looks.append((len(list(rounds.glob("*/round.json"))), read_processors(directory)))
        time.sleep(0.2)
    for process in others:
        process.terminate()
    for process in others:
        process.wait()
    if server.returncode:
        raise SystemExit((directory / "log").read_text()[-3000:])
    last = max(count for count, _ in looks)
    first = next(found for count, found in looks if count >= 2)  # the initial state, and the first round
    final = next(found for count, found in looks if count == last)
    seconds = {kind: (final[kind] - first[kind]) / max(1, last - 2) for kind in PROCESSES}
    return peak, seconds


def read_peak_memory(pid_file: Path) -> int:
    try:
        status = Path(f"/proc/{pid_file.read_text()}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def median_round(output_dir: Path) -> float:
    rounds = sorted((output_dir / "_federation" / "rounds").iterdir())[
        2:
    ]  # without the initial state and the first round
    return statistics.median(json.loads((path / "round.json").read_text())["seconds"] for path in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--cold", action="store_true", help="clients without a long-lived trainer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clients = [f"client-{number}" for number in range(args.clients)]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = prepare(directory, clients, args.rounds)
        datasets = {client: load_rows(directory / f"{client}.jsonl") for client in clients}
        flags = ["--output_dir", str(directory / "process")]
        trainer, _ = load_trainer(config, flags, model=None, train_dataset=datasets)
        trainer.train()
        trainer.owner.close()
        peak, seconds = run_over_flower(directory, config, clients, args.port, args.cold)
        process, flower = median_round(directory / "process"), median_round(directory / "flower")
    print(f"{args.clients} clients, {'cold' if args.cold else 'warm'}, load {os.getloadavg()[0]:.1f}")
    print(f"in process  {process:7.2f} s a round")
    print(f"over Flower {flower:7.2f} s a round: {flower - process:.2f} s are transport, {1 - process / flower:.0%}")
    parts = ", ".join(f"{kind} {value:.2f}" for kind, value in seconds.items() if value >= 0.005)
    print(f"processor   {sum(seconds.values()):7.2f} s a round: {parts}")
    print(f"ServerApp   {peak / 2**20:7.0f} MiB at most")


if __name__ == "__main__":
    main()
