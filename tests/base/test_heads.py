# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a checkpoint does not have starts the same for everybody, and everything else stays as the checkpoint has it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertModel, LlamaForCausalLM, RobertaForMaskedLM

from fedlpp_hf import export_base, load_base
from fedlpp_hf.base.heads import initialize_new_parameters_, list_new_parameters
from tests.helpers import SMALL_MODELS


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """A BERT encoder, a language model of RoBERTa's and one of Llama's, with their bases."""
    folder = tmp_path_factory.mktemp("headless")
    for name, cls, small in (
        ("bert", BertModel, "bert"),
        ("roberta", RobertaForMaskedLM, "roberta"),
        ("llama", LlamaForCausalLM, "llama"),
    ):
        torch.manual_seed(0)
        config = SMALL_MODELS[small][1]
        config.pad_token_id = 0
        cls(config).save_pretrained(folder / name)
        export_base(folder / name, folder / f"{name}-base")
    return folder


HEADS = {
    "bert": ["classifier.weight", "classifier.bias"],
    "roberta": [
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ],
    "llama": ["score.weight"],
}


@pytest.mark.parametrize("name", HEADS)
def test_one_start_for_all(headless, name):
    """Of the full model in two dtypes and of its base, whatever the process drew before."""
    starts = []
    for seed, load in enumerate(
        [
            lambda: AutoModelForSequenceClassification.from_pretrained(headless / name, num_labels=3),
            lambda: AutoModelForSequenceClassification.from_pretrained(
                headless / name, num_labels=3, dtype=torch.bfloat16
            ),
            lambda: load_base(headless / f"{name}-base", AutoModelForSequenceClassification, num_labels=3),
        ]
    ):
        torch.manual_seed(seed)
        model = load()
        assert list_new_parameters(model) == HEADS[name]
        state = torch.get_rng_state()
        assert initialize_new_parameters_(model, 7, torch.float32) == HEADS[name]
        assert torch.equal(state, torch.get_rng_state())
        starts.append({key: model.get_parameter(key) for key in HEADS[name]})
    for start in starts[1:]:
        for key, value in start.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, starts[0][key]), key
    weight = starts[0][HEADS[name][0]]
    assert 0.01 < weight.std() < 0.03  # the model's own initializer_range
    other = AutoModelForSequenceClassification.from_pretrained(headless / name, num_labels=3)
    initialize_new_parameters_(other, 8)
    assert not torch.equal(other.get_parameter(HEADS[name][0]), weight)


def test_a_base_is_loaded_with_the_same_head_each_time(headless):
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(load_base(headless / "bert-base", AutoModelForSequenceClassification, num_labels=3))
    other = load_base(headless / "bert-base", AutoModelForSequenceClassification, num_labels=3, seed=1)
    assert torch.equal(models[0].classifier.weight, models[1].classifier.weight)
    assert not torch.equal(models[0].classifier.weight, other.classifier.weight)


def test_what_the_checkpoint_has_stays(headless, tmp_path):
    """A bias is missing beside a weight that is there, a head is of another size, and a whole layer is new."""
    stored = load_file(headless / "bert" / "model.safetensors")
    lost = ["encoder.layer.1.attention.self.query.bias"] + [name for name in stored if name.startswith("pooler.")]
    save_file({k: v for k, v in stored.items() if k not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((headless / "bert" / "config.json").read_text())
    model = BertModel.from_pretrained(tmp_path)
    assert sorted(list_new_parameters(model)) == sorted(lost)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    initialize_new_parameters_(model, 3)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == ["pooler.dense.weight"]  # biases start at zero
    assert torch.equal(
        model.encoder.layer[1].attention.self.query.weight, stored["encoder.layer.1.attention.self.query.weight"]
    )


def test_a_model_that_was_built_has_nothing_new(headless):
    assert list_new_parameters(BertModel(SMALL_MODELS["bert"][1])) == []
    assert list_new_parameters(LlamaForCausalLM.from_pretrained(headless / "llama")) == []
