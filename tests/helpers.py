# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Builders that more than one test file uses."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fedlpp_hf import (
    FederatedConfig,
    FederatedMixin,
    FederatedServer,
    FederatedTrainer,
    QuantizedBaseCallback,
    RoundStore,
)
from fedlpp_hf.flower.loading import load_rows, load_trainer
from fedlpp_hf.tensors.adapters import adapter_parameters, copy_adapter, read_adapter, write_adapter
from fedlpp_hf.wire.messages import ClientFailure


ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # real models and data, where the machine has them
VOCABULARY = 64  # of the tiny models in conftest.py


# --- Rows.
def make_rows(count: int = 24, seed: int = 0, clients: int = 3, length: int = 12) -> Dataset:
    """Rows of token ids for a causal language model, with a `client` column."""
    generator = torch.Generator().manual_seed(seed)
    # Each row counts upwards from a random token: something that a tiny model can learn.
    start = torch.randint(1, VOCABULARY - length, (count, 1), generator=generator)
    ids = (start + torch.arange(length)).tolist()
    names = [f"site-{row % clients}" for row in range(count)]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": ids, "attention_mask": [[1] * length] * count, "client": names}
    )


def make_labelled_rows(count: int = 24) -> Dataset:
    """Rows of token ids for a classifier of three classes, with a `client` column."""
    rows = make_rows(count)
    labels = [row["input_ids"][0] % 3 for row in rows]
    return rows.remove_columns("labels").add_column("labels", labels)


# --- Trainers, and the adapters in which they end.
def make_args(output_dir, cls=FederatedConfig, **options):
    """A federation of two short rounds."""
    defaults = {
        "num_rounds": 2,
        "partition": "client",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(str(output_dir), **{**defaults, **options})


def make_trainer(model, output_dir, lora, cls=FederatedTrainer, train_dataset=None, eval_dataset=None, **options):
    """A trainer of the federation of [`make_args`]."""
    rows = make_rows() if train_dataset is None else train_dataset
    return cls(
        model, make_args(output_dir, **options), train_dataset=rows, eval_dataset=eval_dataset, peft_config=lora
    )


def assert_equal(left, right):
    """Compare two adapters bit for bit."""
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def task_of(trainer, client="site-0"):
    """The task of one client in the first round, as the server would send it."""
    tasks = []

    def collect(asked):
        tasks.extend(asked)
        raise StopIteration

    server = FederatedServer(
        trainer.args,
        trainer.guard.initial,
        trainer.model.peft_config["default"],
        {name: len(rows) for name, rows in trainer.client_datasets.items()},
        trainer.guard.fingerprint,
    )
    with pytest.raises(StopIteration):
        server.run(collect)
    return next(task for task in tasks if task.client_id == client)


# --- Users' own trainers.
def make_sft_classes():
    """TRL's configuration and trainer, federated as the README says; a test that asks for them skips without TRL."""
    trl = pytest.importorskip("trl", reason="needs the extra [trl]")

    @dataclass
    class FederatedSFTConfig(trl.SFTConfig, FederatedConfig):
        pass

    class FederatedSFTTrainer(FederatedMixin, trl.SFTTrainer):
        pass

    return FederatedSFTConfig, FederatedSFTTrainer


def make_tokenizer():
    """A tokenizer of the tiny models' words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def run_client_script(base, lora, task_dir, update_dir, rows):
    """What a partner's engineer has already, plus one callback."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    args = TrainingArguments(
        str(update_dir / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=rows, callbacks=[QuantizedBaseCallback(task_dir=task_dir, update_dir=update_dir)]
    )
    trainer.train()


# --- What the command line and its reports show.
def make_llama_adapter(full_llama: Path, directory: Path, seed: int) -> Path:
    """An adapter on `full_llama` that is not zero."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(full_llama), config)
    torch.manual_seed(seed)
    tensors = {key: torch.randn_like(value) / 10 for key, value in copy_adapter(adapter_parameters(model)).items()}
    write_adapter(directory, tensors, config)
    return directory


def make_federation(output_dir: Path, adapter_dir: Path) -> RoundStore:
    """The state of a federation of two clients after its first round."""
    store, config = RoundStore(output_dir), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    settings = {"num_rounds": 5, "base_bits": 3, "adapter_bits": 2, "broadcast": "every_round", "max_steps": -1}
    store.create(
        {"federation_id": "f0", "base_fingerprint": "ab" * 32, "clients": {"a": 3, "b": 1}, "config": settings}
    )
    adapter = read_adapter(adapter_dir)[0]
    for number, (proxy, server) in enumerate([(0.4, 0.5), (0.8, 0.7)]):
        clients = {"a": {"num_examples": 3, "loss": 2.0}, "b": {"num_examples": 1, "loss": 4.0}} if number else {}
        record = {"round": number, "clients": clients, "rejected": {}, "seconds": 2.5 * number}
        record |= {"bytes_down": 2000 * number, "bytes_up": 3000 * number}
        record["metrics"] = {"proxy": {"eval_accuracy": proxy}, "server": {"eval_accuracy": server}}
        store.commit(number, adapter, config, {"window_rounds": torch.tensor(1)}, record)
    return store


def read_table(text: str) -> list[list[str]]:
    """The cells of the lines of Markdown tables."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def assert_fails_in_one_line(result: tuple[int, str, str], text: str) -> None:
    """Check exit code, standard output and standard error of a command that can't do what it is told."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("fedlpp-hf: ")]
    assert code == 2 and out == "" and len(lines) == 1
    assert lines[0].startswith("fedlpp-hf: error: ") and text in lines[0] and "Traceback" not in err


# --- Flower.
FINGERPRINT = "a" * 64  # of a base that is only a manifest
CLIENTS = [f"site-{number}" for number in range(3)]


def run_in_process(config, rows, output_dir, failures=(), flags=(), clients=CLIENTS):
    """The federation of `config` with all clients in this process; `failures` are (round, client)."""
    datasets = {client: load_rows(rows / f"{client}.jsonl") for client in clients}
    flags = ["--output_dir", str(output_dir), *flags]
    trainer, _ = load_trainer(config, flags, model=None, train_dataset=datasets)

    def train(tasks):
        for task in tasks:
            failed = (task.round, task.client_id) in failures
            yield ClientFailure(task.client_id, "as planned") if failed else trainer.train_client(task)

    trainer.train_remotely(train, {client: len(dataset) for client, dataset in datasets.items()})
    if trainer.owner is not None:
        trainer.owner.close()
    return read_adapter(output_dir)[0]
