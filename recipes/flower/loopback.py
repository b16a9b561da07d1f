# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Run a server and three clients on this machine, over TLS with node keys, as on four machines; then run the same
federation in one process, and compare the adapters. docs/deployment.md shows this script's output.

    python recipes/data/docstrings.py out/docstrings
    python recipes/owner_warmup.py --config recipes/configs/quickstart_owner.yaml
    python recipes/flower/loopback.py out/docstrings/train.jsonl --full_model out/owner \
        --eval_data out/docstrings/test.jsonl

Hardware: two CPU cores, 6 GB of memory. Expected: "bit-identical" as the last line, after three to five minutes.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from datasets import Dataset

from fedlpp_hf.flower.certificates import make_certificates, make_node_key


HERE = Path(__file__).parent.resolve()
COMMAND = [sys.executable, "-m", "fedlpp_hf.cli.main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "rows", help=".jsonl with the columns text, label and team; the three largest teams are clients"
    )
    parser.add_argument("--full_model", required=True)
    parser.add_argument("--eval_data", required=True)
    parser.add_argument("--directory", default="out/loopback", help="for all files; its contents are deleted")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    directory = Path(args.directory).resolve()
    shutil.rmtree(directory, ignore_errors=True)
    clients = write_rows(Path(args.rows), directory / "rows")
    owner = ["--full_model", str(Path(args.full_model).resolve()), "--eval_data", str(Path(args.eval_data).resolve())]

    # On four machines, each client starts once, sends its node.pub, and receives ca.crt.
    make_certificates(directory / "server", ["127.0.0.1", "localhost"])
    (directory / "keys").mkdir()
    for client in clients:
        make_node_key(directory / client)
        shutil.copy(directory / client / "node.pub", directory / "keys" / f"{client}.pub")

    config = ["--config", str(HERE / "federation.yaml")]
    server = ["server", *config, "--state_dir", "server", "--client_keys", "keys", "--port", str(args.port)]
    processes = [start(directory, "server", *server, *owner, "--output_dir", "over-flower")]
    for client in clients:
        options = ["--data", f"rows/{client}.jsonl", "--state_dir", client, "--cache_dir", f"{client}/bases"]
        options += ["--server", f"127.0.0.1:{args.port}", "--certificate", "server/ca.crt"]
        processes.append(start(directory, client, "client", *config, *options))
    began = time.monotonic()
    try:
        code = processes[0].wait()
    finally:
        for process in processes[1:]:
            process.terminate()
        for process in processes:
            process.wait()
    show(directory, "server")
    show(directory, clients[0])
    if code:
        raise SystemExit(f"The server ended with code {code}; see `{directory}/server.log`.")
    print(f"# over Flower: {time.monotonic() - began:.0f} s\n")

    command = [sys.executable, str(HERE / "text_task.py"), "rows", *config, *owner, "--output_dir", "in-process"]
    subprocess.run(command, cwd=directory, env=environment(), check=True, stdout=subprocess.DEVNULL)
    digests = [hash_adapter(directory / name) for name in ("over-flower", "in-process")]
    print(f"over Flower {digests[0]}\nin process  {digests[1]}")
    if digests[0] != digests[1]:
        raise SystemExit("The adapters differ.")
    print("bit-identical")


def write_rows(source: Path, directory: Path) -> list[str]:
    rows = Dataset.from_json(str(source))
    teams = sorted(set(rows["team"]), key=lambda team: -rows["team"][:].count(team))[:3]
    directory.mkdir(parents=True)
    for team in teams:
        rows.filter(lambda row, team=team: row["team"] == team).to_json(directory / f"{team}.jsonl")
    return sorted(teams)


def environment() -> dict[str, str]:
    # One thread each: four trainers share the cores, and sums must have the same order everywhere.
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(directory: Path, name: str, *arguments: str) -> subprocess.Popen:
    with open(directory / f"{name}.log", "w") as log:
        print(f"$ fedlpp-hf {shorten(' '.join(arguments), directory)}", file=log, flush=True)
        return subprocess.Popen([*COMMAND, *arguments], cwd=directory, env=environment(), stdout=log, stderr=log)


def show(directory: Path, name: str) -> None:
    text = shorten((directory / f"{name}.log").read_text(errors="replace"), directory)
    print(f"# {name}\n{text.strip()}\n")


def shorten(text: str, directory: Path) -> str:
    """Remove this machine's paths, and a terminal's colours and progress bars."""
    text = text.replace(f"{directory}/", "").replace(f"{HERE}/", "").replace(f"{Path.cwd()}/", "")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line.split("\r")[-1]).rstrip() for line in text.splitlines()]
    noise = (
        "warnings.warn",
        "FutureWarning",
        "Loading weights",
        "Map:",
        "split:",
        "Creating json",
        "kernels-community",
        "%|",
    )
    return "\n".join(line for line in lines if line and not any(word in line for word in noise))


def hash_adapter(directory: Path) -> str:
    return hashlib.sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
