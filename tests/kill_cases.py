# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""All work that leaves files behind, as cases to be killed in: rounds, exports, transfers, merges, keys, memories, reports."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedlpp_hf import FederatedConfig, FederatedServer, FederatedTrainer
from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.manifest import check_base
from fedlpp_hf.base.mark_keys import MarkKey, prepare_mark
from fedlpp_hf.client.memory import ClientMemory
from fedlpp_hf.flower.base_transfer import PackedBase, count_received, find_base, receive_piece
from fedlpp_hf.flower.certificates import make_certificates, make_node_key
from fedlpp_hf.flower.client_settings import ClientSettings
from fedlpp_hf.flower.superlink_control import write_app
from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.processes.local_socket import make_key, read_key
from fedlpp_hf.server import loop
from fedlpp_hf.server.store import LOCK_FILE, RoundStore
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate, LocalOptions
from tests.helpers import build_model, make_pair, make_rows, read_files
from tests.trials import Case


_VARIES = ("seconds", "owner_seconds", "traffic", "federation_id", "sha256", "packages")  # from one run to the next
_KEY_A, _KEY_B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
_ROUNDS = 3
_SECRETS = {"full_model": "owner/model", "settings": {"bits": 4}}
Say = Callable[[int], None]


def read_digests(directory: Path) -> dict[str, str]:
    """The digest of every file; JSON without what differs from run to run."""
    found = {}
    for name, data in read_files(directory).items():
        if Path(name).name in (LOCK_FILE, "control.key"):  # who runs it and when; a secret of each directory
            continue
        if name.endswith((".json", ".jsonl")):
            data = json.dumps([_drop(json.loads(line)) for line in _split(name, data)], sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def _split(name: str, data: bytes) -> list[bytes]:
    return data.splitlines() if name.endswith(".jsonl") else [data]


def _drop(value: Any) -> Any:
    return {key: item for key, item in value.items() if key not in _VARIES} if isinstance(value, dict) else value


# --- Rounds of a server with a tiny adapter.
def federate(directory: Path, say: Say) -> None:
    """Three rounds of three clients, begun or resumed as `train` does it; a round is safe when its record is handed out."""
    args = FederatedConfig(
        str(directory / "out"),
        use_cpu=True,
        num_rounds=_ROUNDS,
        adapter_bits=3,
        adapter_block_size=8,
        server_optimizer="yogi",
        save_total_limit=1,
    )
    adapter = {_KEY_A: torch.arange(8.0).view(2, 4) / 8, _KEY_B: torch.zeros(4, 2)}
    config = LoraConfig(r=2, target_modules=["q"])
    rows = {"a": 10, "b": 20, "c": 30}
    server = FederatedServer(args, adapter, config, rows, "ab" * 32, on_round=lambda record: say(record["round"]))
    server.run(lambda tasks: [_answer(task, rows) for task in tasks], resume=server.store.exists)


def _answer(task: ClientTask, rows: dict[str, int]) -> ClientUpdate:
    generator = torch.Generator().manual_seed(task.seed)
    delta = {_KEY_A: torch.randn(2, 4, generator=generator), _KEY_B: torch.randn(4, 2, generator=generator)}
    client = task.client_id
    fields = (task.federation_id, task.round, client, task.base_fingerprint, rows[client], delta)
    return ClientUpdate(*fields, {"loss": 1.0, "steps": 1})


def count_rounds(directory: Path) -> int:
    """The last round that is committed, read as a resumed run does."""
    store = RoundStore(directory / "out")
    latest = store.latest()
    if latest is not None:
        store.records(), store.load(latest)
    return -1 if latest is None else latest


def read_rounds(directory: Path) -> dict[str, Any]:
    store = RoundStore(directory / "out")
    store.load(store.latest() or 0), store.load(0)
    return read_digests(directory / "out")


# --- A whole federation of real clients, with its report.
def save_base(directory: Path) -> None:
    """A full model, `full`, and its base, `base`."""
    build_model("llama").save_pretrained(directory / "full")
    export_base(directory / "full", directory / "base", bits=4, model_class=AutoModelForCausalLM)


def train(directory: Path, say: Say) -> None:
    """Two rounds, and the report. A client's memory is named by the federation's id, which must then be the same each time."""
    loop.secrets = SimpleNamespace(token_hex=lambda count: "f0" * count)  # in a forked child, which ends with this
    args = FederatedConfig(
        str(directory / "out"),
        num_rounds=2,
        partition="client",
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        update_bits=2,
    )
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = FederatedTrainer(str(directory / "base"), args, train_dataset=make_rows(8, clients=2), peft_config=lora)
    trainer.train(resume_from_checkpoint=RoundStore(args.output_dir).exists)


def read_federation(directory: Path) -> dict[str, Any]:
    """The rounds, and the report by its files: times differ in it."""
    found = read_rounds(directory)
    varying = {name for name in found if name.endswith((".md", ".html", ".png"))}
    empty = [name for name in varying if not (directory / "out" / name).stat().st_size]
    return {name: digest for name, digest in found.items() if name not in varying} | {
        "report": sorted(varying),
        "empty": empty,
    }


# --- Bases.
def save_full(directory: Path) -> None:
    build_model("llama").save_pretrained(directory / "full")


def export(directory: Path, say: Say) -> None:
    export_base(directory / "full", directory / "base", bits=2, max_shard_size=20_000, overwrite=True)
    say(0)


def count_exports(directory: Path) -> int:
    if not (directory / "base").exists():
        return -1
    check_base(directory / "base")
    return 0


def read_base(directory: Path) -> dict[str, Any]:
    check_base(directory / "base")
    return read_digests(directory / "base")


def transfer(directory: Path, say: Say) -> None:
    """The server packs the base, and a client takes it in six pieces."""
    packed = PackedBase.pack(directory / "base", directory / "server" / "base.packed")
    cache, piece = directory / "cache", packed.size // 6 + 1
    while find_base(cache, packed.fingerprint) is None:
        have = count_received(cache, packed.fingerprint)
        receive_piece(cache, packed.fingerprint, **packed.read(have, piece))
    say(0)


def read_transfer(directory: Path) -> dict[str, Any]:
    [base] = [path for path in (directory / "cache").iterdir() if path.is_dir()]
    check_base(base)
    assert read_files(base) == read_files(directory / "base")
    return read_digests(directory / "cache") | read_digests(directory / "server")


# --- Merges.
def save_pair(directory: Path) -> None:
    make_pair(directory)


def merge(directory: Path, say: Say) -> None:
    if not (directory / "merged").exists():  # a merge that is there is whole
        merge_adapter(directory / "full", directory / "adapter", directory / "merged", threads=1)
    say(0)


# --- Keys and certificates.
def save_authority(directory: Path) -> None:
    """An authority whose server's certificate is lost: clients hold its `ca.crt`."""
    make_certificates(directory / "state", ["localhost"])
    for name in ("server.crt", "server.key"):
        (directory / "state" / name).unlink()


def certify(directory: Path, say: Say) -> None:
    make_certificates(directory / "state", ["localhost", "127.0.0.1"])
    make_node_key(directory / "node")
    make_key(directory / "node" / "trainer.key")
    say(0)


def read_certificates(directory: Path) -> dict[str, Any]:
    state, node = directory / "state", directory / "node"
    authority, server = (
        x509.load_pem_x509_certificate((state / name).read_bytes()) for name in ("ca.crt", "server.crt")
    )
    server.verify_directly_issued_by(authority)
    key = serialization.load_pem_private_key((state / "server.key").read_bytes(), None)
    private = serialization.load_ssh_private_key((node / "node.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((node / "node.pub").read_bytes())
    return {
        "key of the server": key.public_key() == server.public_key(),
        "key of the node": private.public_key() == public,
        "key of the trainer": len(read_key(node / "trainer.key")),
        "modes": sorted((path.name, oct(path.stat().st_mode)) for path in directory.rglob("*.key")),
    }


def read_kept_authority(directory: Path) -> dict[str, Any]:
    kept = (directory / "state" / "ca.crt").read_bytes() + (directory / "state" / "ca.key").read_bytes()
    return read_certificates(directory) | {"authority": hashlib.sha256(kept).hexdigest()}


# --- What a client and a server write before they start Flower.
def configure(directory: Path, say: Say) -> None:
    settings = ClientSettings(
        "federation.yaml", "rows.jsonl", "a", str(directory / "client"), str(directory / "cache")
    )
    ClientSettings.read(settings.write())
    (directory / "server").mkdir(exist_ok=True)
    write_app(directory / "server", {"address": "127.0.0.1:8000", "insecure": True}, "federation.yaml", [], None)
    say(0)


# --- A client's memory.
def remember(directory: Path, say: Say) -> None:
    """Six rounds, each of which adds to what the client kept in the one before; the last one that was kept may be asked again."""
    began = [int(path.stem.removeprefix("round-")) for path in (directory / "memory").rglob("round-*.safetensors")]
    for number in range(max([1, *began]), 7):
        task = ClientTask("f", number, 6, "a", 0, "ab" * 32, None, LocalOptions())
        memory = ClientMemory(directory / "memory", task)
        kept = memory.read().get("error", torch.zeros(5))
        memory.write({"error": kept * 2 + number})
        say(number)


def count_memories(directory: Path) -> int:
    files = sorted((directory / "memory").rglob("round-*.safetensors"))
    return int(files[-1].stem.removeprefix("round-")) if files and load_file(files[-1]) else -1


# --- The owner's key of marks.
def save_marks(directory: Path) -> None:
    prepare_mark(directory / "marks.json", "a", **_SECRETS)


def mark(directory: Path, say: Say) -> None:
    for number, client in enumerate(("b", "c")):
        prepare_mark(directory / "marks.json", client, **_SECRETS)
        say(number)


def count_marks(directory: Path) -> int:
    return len(MarkKey.read(directory / "marks.json").clients) - 2


def read_marks(directory: Path) -> dict[str, Any]:
    mode = oct(os.stat(directory / "marks.json").st_mode)
    return asdict(MarkKey.read(directory / "marks.json")) | {"mode": mode}


CASES = {
    case.name: case
    for case in (
        Case("rounds", federate, read_rounds, count_safe=count_rounds),
        Case("training", train, read_federation, save_base, count_rounds),
        Case("export", export, read_base, save_full, count_exports),
        Case("transfer", transfer, read_transfer, save_base),
        Case("merge", merge, lambda directory: read_digests(directory / "merged"), save_pair),
        Case("certificates", certify, read_certificates),
        Case("authority", certify, read_kept_authority, save_authority),
        Case("settings", configure, read_digests),
        Case("memory", remember, lambda directory: read_digests(directory / "memory"), count_safe=count_memories),
        Case("marks", mark, read_marks, save_marks, count_marks),
    )
}
