# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Tiny models built from configurations: what most tests need, without a network."""

import os
import tempfile


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
# trackio reads it when it is imported, whoever does that first; else it would write into the user's home.
_TRACKIO = tempfile.TemporaryDirectory(prefix="trackio-")
os.environ["TRACKIO_DIR"] = _TRACKIO.name

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedlpp_hf.base.export import export_base
from tests.fake_hub import run_hub
from tests.helpers import VOCABULARY


# Tests run side by side on few cores, and one thread makes sums reproducible anywhere.
torch.set_num_threads(1)


def save_llama(directory: Path, **sizes: int) -> Path:
    """A Llama of 2 layers with random weights, saved in full precision."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def full_llama(tmp_path_factory) -> Path:
    """A Llama of 2 layers with an untied head, saved in full precision."""
    directory = tmp_path_factory.mktemp("models") / "full-llama"
    return save_llama(directory, hidden_size=64, intermediate_size=96, max_position_embeddings=64)


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory) -> Path:
    """A Llama with enough weights for a mark: 200,000 of them, of which 2,000 are marked."""
    return save_llama(tmp_path_factory.mktemp("models") / "wide-llama", hidden_size=128, intermediate_size=192)


@pytest.fixture(scope="session")
def llama_base(full_llama, tmp_path_factory) -> Path:
    """The 4-bit base of [`full_llama`]."""
    directory = tmp_path_factory.mktemp("bases") / "llama-4bit"
    export_base(full_llama, directory, bits=4, model_class=AutoModelForCausalLM)
    return directory


@pytest.fixture(scope="session")
def full_bert(tmp_path_factory) -> Path:
    """A BERT classifier of 2 layers and 3 classes, saved in full precision."""
    directory = tmp_path_factory.mktemp("models") / "full-bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=3,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    return directory


@pytest.fixture
def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback that huggingface_hub takes for the only one, with a writer's token."""
    with run_hub() as server:
        for module_values in (
            (constants, "ENDPOINT", server.url),
            (constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"),
            (constants, "HF_HUB_OFFLINE", False),
            (constants, "HF_HUB_DISABLE_XET", True),
            (constants, "HF_HUB_CACHE", str(tmp_path / "cache")),
            (_http.time, "sleep", lambda seconds: None),  # retries wait for real Hubs
        ):
            monkeypatch.setattr(*module_values)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "writer")
        yield server
