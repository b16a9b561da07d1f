# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Adapters that were trained with more or fewer tokens than the full model has: merged with theirs, or refused by name."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel

from fedlpp_hf.merge import merge
from fedlpp_hf.merge.merge import merge_adapter
from tests.helpers import assert_equal_states, load_whole, save_adapter


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_VOCABULARY = 64


def _llama(tied: bool):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=_VOCABULARY, tie_word_embeddings=tied, pad_token_id=0, **_SIZES)
    )


def _llava():
    text = transformers.LlamaConfig(vocab_size=_VOCABULARY, **_SIZES)
    vision = transformers.CLIPVisionConfig(**_SIZES | {"num_hidden_layers": 1}, image_size=8, patch_size=4)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    return transformers.LlavaForConditionalGeneration(config)


def _bert(name: str):
    config = transformers.BertConfig(vocab_size=_VOCABULARY, num_labels=3, **_SIZES)
    return getattr(transformers, name)(config)


# A full model; its modules for tokens, in and out; a module to put LoRA on; the task.
MODELS = {
    "untied": (lambda: _llama(False), ["embed_tokens", "lm_head"], "q_proj", "CAUSAL_LM"),
    "tied": (lambda: _llama(True), ["embed_tokens", "lm_head"], "q_proj", "CAUSAL_LM"),
    "two tied pairs": (lambda: _bert("BertForMaskedLM"), ["word_embeddings", "decoder"], "query", None),
    "classifier": (lambda: _bert("BertForSequenceClassification"), ["word_embeddings"], "query", "SEQ_CLS"),
    "vision and language": (_llava, ["embed_tokens", "lm_head"], "q_proj", None),
}


def _make(directory, name: str, tokens: int, saving=None, **lora):
    """A full model on disk, and an adapter for it with another vocabulary. Returns the model with the adapter."""
    build, _, target, task = MODELS[name]
    torch.manual_seed(0)
    build().save_pretrained(directory / "full")
    model = type(build()).from_pretrained(directory / "full")
    model.resize_token_embeddings(tokens, mean_resizing=False)
    config = LoraConfig(**{"r": 4, "target_modules": [target], "task_type": task} | lora)
    return save_adapter(model, config, directory / "adapter", **(saving or {}))


def _check(directory, name: str, tokens: int, trained) -> None:
    """Check that the merged model loads, has the vocabulary, and answers like the model with the adapter."""
    with torch.inference_mode():
        ids = torch.tensor([[3, 7, 11, tokens - 1]])
        expected = trained(input_ids=ids).logits
        report = merge_adapter(directory / "full", directory / "adapter", directory / "out", verify=True)
        merged = load_whole(type(MODELS[name][0]()), directory / "out")
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.get_text_config().vocab_size == tokens and report.verified
    assert len(merged.get_input_embeddings().weight) == tokens


@pytest.mark.parametrize("tokens", [68, 60])
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_saved_along(tmp_path, name, tokens):
    _check(tmp_path, name, tokens, _make(tmp_path, name, tokens, {"save_embedding_layers": True}))


@pytest.mark.parametrize("saving", [{}, {"save_embedding_layers": False}])
@pytest.mark.parametrize("tokens", [68, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["untied", "tied", "classifier", "vision and language"])
def test_modules_to_save(tmp_path, name, tokens, saving):
    """As LLaMA-Factory and axolotl write them for added tokens."""
    _check(tmp_path, name, tokens, _make(tmp_path, name, tokens, saving, modules_to_save=MODELS[name][1]))


@pytest.mark.parametrize("name", ["untied", "tied", "two tied pairs", "classifier"])
def test_lora_on_embeddings(tmp_path, name):
    modules = [MODELS[name][2], *MODELS[name][1]]
    _check(tmp_path, name, 68, _make(tmp_path, name, 68, {"save_embedding_layers": True}, target_modules=modules))


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_through_peft(tmp_path, name):
    tokens = {"embed_tokens": [3, 65]}
    trained = _make(tmp_path, name, 68, {"save_embedding_layers": True}, trainable_token_indices=tokens)
    with torch.inference_mode():
        ids = torch.tensor([[3, 7, 65, 67]])
        expected = trained(input_ids=ids).logits
        assert merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out").through_peft
        merged = load_whole(transformers.LlamaForCausalLM, tmp_path / "out")
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.vocab_size == 68 and merged.config.tie_word_embeddings == (name == "tied")


@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize("tokens", [68, 60])
def test_equals_peft_to_the_bit(tmp_path, name, tokens):
    _make(tmp_path, name, tokens, {"save_embedding_layers": True})
    merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out", verify=True)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "full")
    model.resize_token_embeddings(tokens, mean_resizing=False)
    expected = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    merged = load_whole(transformers.LlamaForCausalLM, tmp_path / "out")
    assert_equal_states(merged.state_dict(), expected)
    assert merged.config.tie_word_embeddings == (name == "tied")


def test_encoder_gets_a_head_and_tokens(tmp_path):
    trained = _make(tmp_path, "classifier", 68, {"save_embedding_layers": True})
    full = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "full")
    full.bert.save_pretrained(tmp_path / "encoder")  # two labels, no head
    (tmp_path / "full").rename(tmp_path / "classifier")
    (tmp_path / "encoder").rename(tmp_path / "full")
    _check(tmp_path, "classifier", 68, trained)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 68


@pytest.mark.parametrize(
    ("name", "saving", "lora"),
    [
        ("untied", {"save_embedding_layers": False}, {"target_modules": ["q_proj", "embed_tokens"]}),
        ("untied", {}, {"target_modules": ["q_proj", "embed_tokens"]}),  # PEFT saves the embeddings, and no head
        ("untied", {"save_embedding_layers": False}, {"modules_to_save": ["lm_head"]}),
        ("tied", {"save_embedding_layers": False}, {"modules_to_save": ["embed_tokens"]}),
        ("tied", {"save_embedding_layers": False}, {"trainable_token_indices": [3, 66]}),
    ],
)
def test_adapter_without_all_new_tokens_is_refused(tmp_path, name, saving, lora):
    _make(tmp_path, name, 68, saving, **lora)
    with pytest.raises(ValueError, match=r"vocabulary of .*6[78] tokens, where the full model has 64.*resize_token"):
        merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_transformers_resizes_beside_the_embeddings_is_refused(tmp_path):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=64, **sizes))
    model.save_pretrained(tmp_path / "full")
    model.resize_token_embeddings(68, mean_resizing=False)
    config = LoraConfig(target_modules=["q_proj"])
    save_adapter(model, config, tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(ValueError, match="vocabulary of 68 tokens, where the full model has 64.*final_logits_bias"):
        merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out")


def test_padding_beyond_a_smaller_vocabulary_is_refused(tmp_path):
    _make(tmp_path, "untied", 60, {"save_embedding_layers": True})
    config = tmp_path / "full" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": 63}))
    with pytest.raises(ValueError, match=r"vocabulary of 60 tokens, .*Padding_idx"):
        merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("through_peft", [False, True])
def test_tokenizer_of_the_training_comes_along(tmp_path, monkeypatch, through_peft):
    warned = []
    monkeypatch.setattr(merge.logger, "warning", warned.append)
    _make(tmp_path, "untied", 68, {"save_embedding_layers": True}, init_lora_weights="pissa" if through_peft else True)
    for name, files in (("full", ["tokenizer_config.json", "vocab.txt"]), ("adapter", [])):
        for file in files:
            (tmp_path / name / file).write_text(f'{{"of": "{name}"}}')
    merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "old")
    assert "full" in (tmp_path / "old" / "tokenizer_config.json").read_text()
    assert any("68 tokens, and the tokenizer is the full model's" in line for line in warned)
    for file in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / "adapter" / file).write_text('{"of": "adapter"}')
    warned.clear()
    merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "new")
    assert "adapter" in (tmp_path / "new" / "tokenizer_config.json").read_text() and not warned
    assert (tmp_path / "new" / "tokenizer.json").is_file() and not (tmp_path / "new" / "vocab.txt").exists()
