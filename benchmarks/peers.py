# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What simulating a federation costs without any training: ours, Flower's simulation with Ray, and NVFlare's simulator.

    python -m benchmarks.peers [--clients 10] [--rounds 4] [--flower ENV/bin/python] [--nvflare ENV/bin/python]

Clients send back what they were sent, 35 thousand values in float32. Ours also exports a base of 2 layers, loads it, and
checks and commits each round. A peer runs where it can be imported: in this environment, or in those of the interpreters
that are named (`pip install 'flwr[simulation]==1.41.0'`, `pip install nvflare`). Printed are the seconds from the start of
the process to the end of its first round, and the median of the rounds after it.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path


OURS = """
import sys
from pathlib import Path
from datasets import Dataset
from peft import LoraConfig
from benchmarks.many_clients import make_base
from fedlpp_hf import FederatedConfig, FederatedTrainer
from fedlpp_hf.wire.messages import ClientUpdate

class IdleTrainer(FederatedTrainer):
    def train_client(self, task):
        ids, metrics = (task.federation_id, task.round, task.client_id, task.base_fingerprint), {"loss": 0, "steps": 1}
        return ClientUpdate(*ids, 1, task.proxy_tensors(), metrics)

    def train_clients(self, tasks):
        print("round")
        yield from super().train_clients(tasks)

clients, rounds = map(int, sys.argv[1:])
args = FederatedConfig(
    "out", num_rounds=rounds, num_clients=clients, adapter_bits=32, use_cpu=True, disable_tqdm=True, report_to=[]
)
rows = Dataset.from_dict({"input_ids": [[1] * 16] * clients, "labels": [[1] * 16] * clients})
lora = LoraConfig(r=11, target_modules="all-linear", task_type="CAUSAL_LM")
IdleTrainer(str(make_base(Path("."))), args, train_dataset=rows, peft_config=lora).train()
print("done")
"""

FLOWER = """
import sys
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

clients, rounds = map(int, sys.argv[1:])
client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)

class TimedFedAvg(FedAvg):
    def configure_train(self, *args, **kwargs):
        print("round")
        return super().configure_train(*args, **kwargs)

@server.main()
def main(grid, context):
    strategy = TimedFedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.start(grid=grid, initial_arrays=ArrayRecord([np.zeros(35_000, np.float32)]), num_rounds=rounds)
    print("done")

resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
run_simulation(server_app=server, client_app=client, num_supernodes=clients, backend_config=resources)
"""

NVFLARE = """
import sys
from pathlib import Path
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner

CLIENT = '''
import nvflare.client as flare
flare.init()
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params=model.params, params_type=model.params_type))
'''
clients, rounds = map(int, sys.argv[1:])
Path("idle_client.py").write_text(CLIENT)
job = FedJob(name="idle", min_clients=clients)
job.to_server(NPModelPersistor(model=[[0.0] * 35_000]), id="persistor")
job.to_server(FedAvg(num_clients=clients, num_rounds=rounds, persistor_id="persistor"))
for number in range(clients):
    job.to(ScriptRunner(script="idle_client.py", framework=FrameworkType.NUMPY), f"site-{number}")
job.simulator_run("work", threads=2)
"""
# For each: its script, the modules without which it does not run, and the words of its output at which a round begins and
# the last one ends.
PEERS = {
    "ours": (OURS, "fedlpp_hf", "round", "done"),
    "flower": (FLOWER, "flwr, ray", "round", "done"),
    "nvflare": (NVFLARE, "nvflare", " started.", "Finished FedAvg."),
}


def run_peer(name: str, python: str, clients: int, rounds: int, limit: float) -> str:
    """A row of the table."""
    script, modules, round_mark, end_mark = PEERS[name]
    if subprocess.run([python, "-c", f"import {modules}"], capture_output=True).returncode:
        return f"| {name} | not measured: {modules} can't be imported by {Path(python).name} | |"
    # Ray gives its own processes seconds to start, which a busy machine exceeds.
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.getcwd(), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_raylet_start_wait_time_s": "120", "RAY_agent_register_timeout_ms": "120000",
    }  # fmt: skip
    marks = [time.perf_counter()]
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        Path(folder, "script.py").write_text(script)
        command = [shutil.which("timeout") or "timeout", str(limit), python, "script.py", str(clients), str(rounds)]
        with subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            for line in process.stdout or ():
                text = line.strip()
                if (
                    text == round_mark
                    or (round_mark.startswith(" ") and text.endswith(round_mark))
                    or end_mark in text
                ):
                    marks.append(time.perf_counter())
    if len(marks) != rounds + 2:
        return f"| {name} | not measured: it ended after {max(len(marks) - 2, 0)} of {rounds} rounds | |"
    laps = [end - start for start, end in pairwise(marks[2:])]
    return f"| {name} | {marks[2] - marks[0]:.1f} | {statistics.median(laps):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a peer is ended")
    parser.add_argument("--flower", default=os.environ.get("FLOWER_PYTHON", sys.executable))
    parser.add_argument("--nvflare", default=os.environ.get("NVFLARE_PYTHON", sys.executable))
    options = parser.parse_args()
    pythons = {"ours": sys.executable, "flower": options.flower, "nvflare": options.nvflare}
    print(
        f"| {options.clients} clients | seconds to the end of the first round | seconds of a later round |\n|---|---|---|"
    )
    for name, python in pythons.items():
        print(run_peer(name, python, options.clients, options.rounds, options.limit), flush=True)


if __name__ == "__main__":
    main()
