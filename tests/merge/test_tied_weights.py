# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Weights that share one tensor: whatever an adapter does to one of them, the merged model answers like the adapted one."""

import json

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.merge.tying import list_tied_groups
from tests.helpers import load_whole, save_adapter


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def _llama():
    config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=True, pad_token_id=0, **_SIZES)
    return transformers.LlamaForCausalLM(config)


def _bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **_SIZES))


def _gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    )


# A model with tied weights; a module for LoRA; its embedding and its head.
MODELS = {
    "llama": (_llama, "q_proj", "embed_tokens", "lm_head"),
    "bert": (_bert, "query", "word_embeddings", "decoder"),  # and a second tied pair, of biases
    "gpt2": (_gpt2, "c_attn", "wte", "lm_head"),
}


def _adapt(directory, name: str, peft_config, **saving) -> torch.Tensor:
    """Save a full model and an adapter. Returns the logits of the two together, as PEFT loads them."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    model.save_pretrained(directory / "full")
    save_adapter(model, peft_config, directory / "adapter", **saving)
    model = type(model).from_pretrained(directory / "full")
    adapted = PeftModel.from_pretrained(model, directory / "adapter").eval()
    with torch.inference_mode():
        return adapted(input_ids=torch.arange(20)[None]).logits


def _merge(directory, name: str):
    report = merge_adapter(directory / "full", directory / "adapter", directory / "out", verify=True)
    model = load_whole(type(MODELS[name][0]()), directory / "out")
    with torch.inference_mode():
        return report, model, model(input_ids=torch.arange(20)[None]).logits


# What stays tied, because both sides become the same.
SAME = {
    "a layer": lambda lora, embedding, head: LoraConfig(target_modules=[lora]),
    "biases": lambda lora, embedding, head: LoraConfig(target_modules=[lora], bias="all"),
    "LoHa": lambda lora, embedding, head: peft.LoHaConfig(target_modules=["o_proj", "dense", "nothing"]),
    "PiSSA": lambda lora, embedding, head: LoraConfig(target_modules=[lora], init_lora_weights="pissa"),
    "tokens": lambda lora, embedding, head: LoraConfig(
        target_modules=[lora], trainable_token_indices={embedding: [3, 4]}
    ),
}
# What is untied: natively, and through PEFT.
NATIVE = {
    "LoRA on the head": lambda lora, embedding, head: LoraConfig(target_modules=[lora, head]),
    "LoRA on the embedding": lambda lora, embedding, head: LoraConfig(target_modules=[embedding]),
    "LoRA on both": lambda lora, embedding, head: LoraConfig(target_modules=[embedding, head]),
    "a head saved whole": lambda lora, embedding, head: LoraConfig(target_modules=[lora], modules_to_save=[head]),
    "both saved whole": lambda lora, embedding, head: LoraConfig(
        target_modules=[lora], modules_to_save=[embedding, head]
    ),
    "DoRA on the head": lambda lora, embedding, head: LoraConfig(target_modules=[head], use_dora=True),
}
THROUGH_PEFT = {
    "tokens of the head": lambda lora, embedding, head: LoraConfig(
        target_modules=[lora], trainable_token_indices={head: [3, 4]}
    ),
    "other tokens in each": lambda lora, embedding, head: LoraConfig(
        target_modules=[lora], trainable_token_indices={embedding: [3, 4], head: [3, 5]}
    ),
    "PiSSA on the head": lambda lora, embedding, head: LoraConfig(target_modules=[head], init_lora_weights="pissa"),
    "DoRA on the embedding": lambda lora, embedding, head: LoraConfig(target_modules=[embedding], use_dora=True),
    "LoHa on the head": lambda lora, embedding, head: peft.LoHaConfig(target_modules=[head]),
    "IA3 on the head": lambda lora, embedding, head: peft.IA3Config(target_modules=[head], feedforward_modules=[]),
}


_NAMES = ["llama", "bert", pytest.param("gpt2", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("name", _NAMES)
def test_weights_that_become_the_same_stay_tied(tmp_path, name, kind):
    if (name, kind) == ("gpt2", "LoHa"):
        pytest.skip("PEFT has no LoHa for Conv1D")
    expected = _adapt(tmp_path, name, SAME[kind](*MODELS[name][1:]))
    report, merged, logits = _merge(tmp_path, name)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings and not report.added
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("kind", [*NATIVE, *THROUGH_PEFT])
@pytest.mark.parametrize("name", _NAMES)
def test_weights_that_become_different_are_untied(tmp_path, name, kind):
    expected = _adapt(tmp_path, name, (NATIVE | THROUGH_PEFT)[kind](*MODELS[name][1:]))
    report, merged, logits = _merge(tmp_path, name)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert not merged.config.tie_word_embeddings and bool(report.through_peft) == (kind in THROUGH_PEFT)


def test_adapters_that_are_tied_themselves_change_one_tensor(tmp_path):
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    expected = _adapt(tmp_path, "llama", config)
    _, merged, logits = _merge(tmp_path, "llama")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("kind", ["LoRA on the head", "tokens", "a layer"])
def test_tied_weights_that_are_stored_twice(tmp_path, kind):
    """As older versions and converters write them."""
    expected = _adapt(tmp_path, "llama", (NATIVE | SAME)[kind](*MODELS["llama"][1:]))
    file = tmp_path / "full" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    _, merged, logits = _merge(tmp_path, "llama")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings == (kind != "LoRA on the head")


def test_pairs_that_have_nothing_to_do_with_each_other():
    groups = list_tied_groups(_bert())
    weights = {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}
    assert {frozenset(group) for group in groups} == {
        frozenset(weights),
        frozenset({"cls.predictions.bias", "cls.predictions.decoder.bias"}),
    }


def test_configurations_within_are_untied(tmp_path):
    text = transformers.Gemma3TextConfig(vocab_size=64, head_dim=16, num_key_value_heads=2, **_SIZES)
    vision = transformers.SiglipVisionConfig(**_SIZES | {"num_hidden_layers": 1}, image_size=8, patch_size=4)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "full")
    save_adapter(model, LoraConfig(target_modules=["lm_head"]), tmp_path / "adapter")
    model = load_whole(type(model), tmp_path / "full")
    with torch.inference_mode():
        ids = torch.tensor([[7, 8, 9, 30]])
        expected = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(input_ids=ids).logits
        merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out", verify=True)
        merged = load_whole(type(model), tmp_path / "out")
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
def test_three_that_share_are_refused(tmp_path, kind):
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, **sizes))
    model.save_pretrained(tmp_path / "full")
    config = peft.LoHaConfig(target_modules=["lm_head"]) if kind == "LoHa" else LoraConfig(target_modules=["lm_head"])
    save_adapter(model, config, tmp_path / "adapter")
    with pytest.raises(ValueError, match="lm_head.*shares with .*shared.*told apart"):
        merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
