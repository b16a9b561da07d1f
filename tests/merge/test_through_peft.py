# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What PEFT merges, and what PEFT can't."""

import shutil

import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file

from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.tensors.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.helpers import assert_equal_states, change_tensor, load_whole, make_pair, merge_with_peft, save_adapter


_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **_SIZES))


def _bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **_SIZES))


@pytest.mark.parametrize("layers", [[[0, 2], [1, 2]], [[0, 1], [0, 2]], [[1, 2]]])
@pytest.mark.parametrize(("build", "target"), [(_llama, "q_proj"), (_bert, "query")])
def test_replicated_layers_get_their_own_weights(tmp_path, build, target, layers):
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "full")
    config = LoraConfig(target_modules=[target], layer_replication=layers)
    adapted = save_adapter(model, config, tmp_path / "adapter")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected = adapted(input_ids=ids).logits
        report = merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out")
        merged = load_whole(type(model), tmp_path / "out")
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.num_hidden_layers == sum(stop - start for start, stop in layers)
    assert "layer_replication" in report.through_peft


def test_what_a_configuration_says_of_each_layer_is_replicated(tmp_path):
    """PEFT leaves it as it was, so that its own model does not run."""
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma2Config(head_dim=16, num_key_value_heads=2, layer_types=kinds, pad_token_id=0, **_SIZES)
    model = transformers.Gemma2ForCausalLM(config)
    model.save_pretrained(tmp_path / "full")
    lora = LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    save_adapter(model, lora, tmp_path / "adapter")
    merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out")
    merged = load_whole(transformers.Gemma2ForCausalLM, tmp_path / "out")
    assert merged.config.layer_types == [*kinds, kinds[1]]
    merged(torch.arange(20)[None])


KINDS = {
    "LoHa": peft.LoHaConfig(target_modules=["q_proj"]),
    "VeRA": peft.VeraConfig(target_modules=["q_proj"]),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "SHiRA": peft.ShiraConfig(target_modules=["q_proj"], r=4),  # with indices that are integers
    "IA3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "OLoRA": LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_peft(tmp_path, kind):
    torch.manual_seed(0)
    model = _llama()
    model.save_pretrained(tmp_path / "full")
    save_adapter(model, KINDS[kind], tmp_path / "adapter")
    assert merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out").through_peft
    merged = load_whole(transformers.LlamaForCausalLM, tmp_path / "out")
    expected = merge_with_peft(tmp_path / "full", tmp_path / "adapter", transformers.LlamaForCausalLM)
    assert_equal_states(merged.state_dict(), expected)


def test_adapters_with_nothing_to_merge_are_refused(tmp_path):
    model = _llama()
    model.save_pretrained(tmp_path / "full")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    save_adapter(model, config, tmp_path / "adapter")
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter: it adds inputs"):
        merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out")


def test_head_and_class_are_those_of_the_adapter(tmp_path):
    """As for what is merged natively: the checkpoint is an encoder without a head."""
    model = _bert()
    model.bert.save_pretrained(tmp_path / "full")
    adapted = save_adapter(model, peft.LoHaConfig(target_modules=["query"], task_type="SEQ_CLS"), tmp_path / "adapter")
    merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out")
    merged = load_whole(transformers.BertForSequenceClassification, tmp_path / "out")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_adapter_of_another_architecture_is_refused(tmp_path):
    _bert().save_pretrained(tmp_path / "full")
    save_adapter(_llama(), peft.LoHaConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    with pytest.raises(ValueError, match="q_proj.*no place in BertForSequenceClassification"):
        merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_beside_the_full_model_is_not_merged_too(tmp_path):
    """`from_pretrained` would load it."""
    full, adapter, model_class = make_pair(tmp_path, trainable_token_indices=[1, 5])
    expected = merge_with_peft(full, adapter, model_class)
    _, other, _ = make_pair(tmp_path / "other", use_rslora=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(other / name, full / name)
    assert merge_adapter(full, adapter, tmp_path / "out").through_peft
    assert_equal_states(load_whole(model_class, tmp_path / "out").state_dict(), expected)
    assert not (tmp_path / "out" / ADAPTER_CONFIG).exists()


@pytest.mark.parametrize("lora", [{}, {"trainable_token_indices": [1, 5]}])
def test_damage_that_was_there_stays_there(tmp_path, lora):
    """NaN in a tensor that the adapter does not change is the full model's; a copy does not look at it."""
    full, adapter, _ = make_pair(tmp_path, shard_size="1GB", **lora)
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensor(full / "model.safetensors", name, lambda tensor: tensor.index_fill(0, torch.tensor(3), float("nan")))
    merge_adapter(full, adapter, tmp_path / "out", verify=True)
    before, after = (load_file(place / "model.safetensors") for place in (full, tmp_path / "out"))
    assert torch.equal(before[name].isnan(), after[name].isnan()) and after[name].isnan().any()
