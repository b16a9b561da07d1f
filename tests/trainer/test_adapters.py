# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Adapters that a federation trains, and those that it refuses when the trainer is made."""

from dataclasses import dataclass

import pytest
import torch
import transformers
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoftQConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoConfig, AutoModelForCausalLM

from fedlpp_hf import FederatedTrainer, export_base, load_base
from fedlpp_hf.base.full_model import FullModel
from fedlpp_hf.client.adapter_config import check_adapter_config
from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.processes.blueprint import TrainerBlueprint
from fedlpp_hf.processes.model_check import check_adapter_fits
from fedlpp_hf.processes.owner import OwnerProcess
from fedlpp_hf.processes.owner_handler import OwnerHandler
from fedlpp_hf.tensors.adapters import adapter_parameters, copy_adapter, scrub_config
from tests.helpers import make_args, make_labelled_rows, make_rows, make_trainer


TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
INITS = ["olora", "pissa", "pissa_niter_4", "corda", "lora_ga", "loftq", "eva", "mica", "orthogonal", "a_new_one"]


def digest(model):
    return {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}


@pytest.mark.parametrize("init", INITS)
def test_inits_that_move_the_base_or_need_data_are_refused(full_llama, tmp_path, init):
    more = {"loftq_config": LoftQConfig()} if init == "loftq" else {}
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' does not go with a federation: it .*'gaussian'"):
        make_trainer(str(full_llama), tmp_path / "out", LoraConfig(r=4, init_lora_weights=init, **TARGETS, **more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_a_model_that_was_wrapped_by_such_an_init_is_refused_too(full_llama, llama_base, tmp_path, init):
    model = load_base(llama_base) if init == "olora" else AutoModelForCausalLM.from_pretrained(full_llama)
    peft_model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=init, **TARGETS))
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
        FederatedTrainer(peft_model, make_args(tmp_path, base_bits=32), train_dataset=make_rows())


WORKING = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "random B": {"init_lora_weights": False},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "tokens": {"trainable_token_indices": [3, 4]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", WORKING)
def test_adapters_that_train_leave_the_base_alone_and_merge(full_llama, llama_base, tmp_path, name):
    lora = LoraConfig(**{"r": 4, **TARGETS, **WORKING[name]})
    base = load_base(llama_base)
    before = digest(base)
    trainer = make_trainer(base, tmp_path / "out", lora, num_rounds=1, eval_dataset=make_rows())
    wrapped = {
        key.replace("base_layer.", "").replace("original_module.", "").replace("token_adapter.", ""): value
        for key, value in base.state_dict().items()
    }
    for key, value in before.items():
        assert torch.equal(wrapped[key], value), key
    trainer.train()
    merge_adapter(full_llama, tmp_path / "out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(full_llama), tmp_path / "out").eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, served(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(total_step=10, **TARGETS),
        VeraConfig(r=4, **TARGETS),
        LoHaConfig(r=4, **TARGETS),
        IA3Config(task_type="CAUSAL_LM"),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_other_than_lora(full_llama, tmp_path, config):
    with pytest.raises(ValueError, match=f"peft_config has the type {type(config).__name__}; expected LoraConfig"):
        make_trainer(str(full_llama), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [{"layer_replication": [[0, 2], [1, 2]]}, {"use_qalora": True}, {"alora_invocation_tokens": [3]}],
    ids=lambda option: next(iter(option)),
)
def test_options_with_which_it_is_more_than_lora(full_llama, tmp_path, option):
    with pytest.raises(ValueError, match=rf"LoraConfig\({next(iter(option))}=.*does not go with a federation"):
        make_trainer(str(full_llama), tmp_path, LoraConfig(r=4, **TARGETS, **option))


def test_a_configuration_that_is_none(llama_base, tmp_path):
    with pytest.raises(ValueError, match="peft_config has the type dict; expected LoraConfig"):
        make_trainer(str(llama_base), tmp_path, {"r": 4})


@pytest.mark.parametrize(
    ("task", "lora", "message"),
    [
        (
            "CAUSAL_LM",
            {"target_modules": ["query"]},
            r"\['query'\]: the adapter fits no module of Llama.*q_proj, k_proj",
        ),
        (
            "CAUSAL_LM",
            {"target_modules": "q"},
            "target_modules='q': the adapter fits no .* set target_modules='all-linear'",
        ),
        (
            "SEQ_CLS",
            {"target_modules": ["q_proj"]},
            r"\['q_proj'\]: the adapter fits no module of Bert.*query, key, value",
        ),
        (
            "SEQ_CLS",
            {"target_modules": ["query"], "modules_to_save": ["clasifier"]},
            "'clasifier', and Bert.*`classifier`",
        ),
        (
            None,
            {"target_modules": ["query"], "modules_to_save": ["pooller"]},
            "'pooller', and Bert.*did you mean `pooler`",
        ),
    ],
)
def test_modules_that_the_model_does_not_have(full_llama, full_bert, tmp_path, task, lora, message):
    """PEFT passes over what it would save, so that a typing error leaves a head untrained without a word."""
    full = full_llama if task == "CAUSAL_LM" else full_bert
    source, config = FullModel(full), AutoConfig.from_pretrained(full)
    model_class = getattr(transformers, config.architectures[0])
    lora = LoraConfig(r=4, task_type=task, **lora)
    with pytest.raises(ValueError, match=message):  # the owner, before it exports
        check_adapter_fits(source, config, model_class, lora)
    with pytest.raises(ValueError, match=message):  # and where there is none
        make_trainer(model_class.from_pretrained(full), tmp_path, lora, base_bits=32)


def test_an_option_that_a_later_peft_brings():
    @dataclass
    class LaterConfig(LoraConfig):
        use_something: bool = False

    check_adapter_config(LaterConfig())
    with pytest.raises(ValueError, match=r"LoraConfig\(use_something=True\)"):
        check_adapter_config(LaterConfig(use_something=True))


def test_names_and_numbers_of_adapters(llama_base, tmp_path, lora):
    args, rows = make_args(tmp_path), make_rows()
    named = get_peft_model(load_base(llama_base), lora, adapter_name="mine")
    with pytest.raises(
        ValueError, match=r"the adapters \['mine'\], of which \['mine'\] are active; expected .*'default'"
    ):
        FederatedTrainer(named, args, train_dataset=rows)
    two = get_peft_model(load_base(llama_base), lora)
    two.add_adapter("second", lora)
    two.set_adapter("second")
    with pytest.raises(ValueError, match=r"of which \['second'\] are active"):
        FederatedTrainer(two, args, train_dataset=rows)
    two.set_adapter("default")
    trainer = FederatedTrainer(two, args, train_dataset=rows)  # the other one rests
    assert all(".second." not in key for key in trainer.guard.parameters)


def test_a_peft_model_with_another_configuration(llama_base, tmp_path, lora):
    model = get_peft_model(load_base(llama_base), lora)
    with pytest.raises(ValueError, match="has an adapter, and `peft_config` describes another"):
        make_trainer(model, tmp_path, LoraConfig(r=2, **TARGETS))
    assert make_trainer(model, tmp_path, lora).guard.peft_config.r == lora.r  # the one that it was made with


def test_biases_that_can_not_be_merged(llama_base, full_bert, tmp_path):
    with pytest.raises(ValueError, match=r"lora_bias=True, but `.*q_proj` has no bias"):
        make_trainer(str(llama_base), tmp_path, LoraConfig(r=4, lora_bias=True, **TARGETS))
    classifier = {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    data = {"train_dataset": make_labelled_rows(), "base_bits": 32}
    with pytest.raises(ValueError, match=r"bias='all' and modules_to_save=\['classifier', 'score'\]"):
        make_trainer(str(full_bert), tmp_path, LoraConfig(bias="all", **classifier), **data)
    with pytest.raises(ValueError, match="aggregation='exact' does not go with an adapter of lora_bias=True"):
        make_trainer(str(full_bert), tmp_path, LoraConfig(lora_bias=True, **classifier), aggregation="exact", **data)


def test_modules_that_the_base_has_quantized(llama_base, tmp_path):
    with pytest.raises(
        ValueError, match=r"modules_to_save=\['o_proj'\]: `model.layers.0.self_attn.o_proj` is quantized"
    ):
        make_trainer(str(llama_base), tmp_path, LoraConfig(r=4, modules_to_save=["o_proj"], **TARGETS))


def test_a_head_that_the_base_has_quantized(full_bert, tmp_path):
    """PEFT trains the head of a classifier though nobody wrote it into `modules_to_save`."""
    export_base(full_bert, tmp_path / "base", skip_modules=[])
    lora = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="`classifier` is quantized in this base.*`classifier` in `skip_modules`"):
        make_trainer(str(tmp_path / "base"), tmp_path / "out", lora, train_dataset=make_labelled_rows())


def test_an_adapter_that_could_not_be_merged_is_refused_before_any_round(full_llama, tmp_path, lora, monkeypatch):
    """The owner plans the merge when the trainer is made."""
    blueprint = TrainerBlueprint(str(full_llama), make_args(tmp_path), FederatedTrainer, None, lora)
    handler = OwnerHandler(blueprint, tmp_path)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(full_llama), lora)
    adapter = copy_adapter(adapter_parameters(peft_model))
    handler.check_merge(adapter, scrub_config(lora))
    key = next(iter(adapter))
    with pytest.raises(ValueError, match=f"`{key}` has shape"):
        handler.check_merge(adapter | {key: torch.ones(3, 64)}, scrub_config(lora))

    def refuse(self, adapter, peft_config):
        assert adapter.keys() and peft_config.r == lora.r
        raise ValueError("it can't be merged")

    monkeypatch.setattr(OwnerProcess, "check_merge", refuse)
    with pytest.raises(ValueError, match="it can't be merged"):
        make_trainer(str(full_llama), tmp_path / "out", lora)
    assert not (tmp_path / "out" / "_federation" / "rounds").exists()
