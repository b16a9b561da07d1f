# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which class a checkpoint is loaded as."""

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    DebertaV2Config,
    ElectraConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    Qwen2VLConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from fedlpp_hf.base.model_class import choose_model_class, is_headless, list_float_modules
from tests.helpers import SMALL_MODELS


@pytest.mark.parametrize(
    ("config", "stored", "task", "head", "expected"),
    [
        (BertConfig, "BertForSequenceClassification", None, None, "BertForSequenceClassification"),
        (BertConfig, "BertForTokenClassification", None, None, "BertForTokenClassification"),
        (BertConfig, "BertForTokenClassification", "TOKEN_CLS", None, "BertForTokenClassification"),
        (BertConfig, "BertForMaskedLM", None, "CAUSAL_LM", "BertForMaskedLM"),
        (BertConfig, "BertForMaskedLM", "SEQ_CLS", None, "BertForSequenceClassification"),
        (BertConfig, "BertModel", "SEQ_CLS", None, "BertForSequenceClassification"),
        (BertConfig, "BertModel", "QUESTION_ANS", None, "BertForQuestionAnswering"),
        (BertConfig, "BertForSequenceClassification", "FEATURE_EXTRACTION", None, "BertModel"),
        (LlamaConfig, "LlamaForCausalLM", "SEQ_CLS", None, "LlamaForSequenceClassification"),
        (LlamaConfig, "LlamaModel", None, "CAUSAL_LM", "LlamaForCausalLM"),
        (LlamaConfig, "LlamaForSequenceClassification", None, "CAUSAL_LM", "LlamaForSequenceClassification"),
        (LlamaConfig, "LlamaForCausalLM", "TOKEN_CLS", None, "LlamaForTokenClassification"),
        (GPT2Config, "GPT2LMHeadModel", "SEQ_CLS", None, "GPT2ForSequenceClassification"),
        (RobertaConfig, "RobertaForMaskedLM", "TOKEN_CLS", None, "RobertaForTokenClassification"),
        (DebertaV2Config, "DebertaV2Model", "SEQ_CLS", None, "DebertaV2ForSequenceClassification"),
        (ElectraConfig, "ElectraForPreTraining", "SEQ_CLS", None, "ElectraForSequenceClassification"),
        (T5Config, "T5Model", None, "SEQ_2_SEQ_LM", "T5ForConditionalGeneration"),
        (BartConfig, "BartModel", "SEQ_2_SEQ_LM", None, "BartForConditionalGeneration"),
        (WhisperConfig, "WhisperForConditionalGeneration", "SEQ_2_SEQ_LM", None, "WhisperForConditionalGeneration"),
        (ViTConfig, "ViTForImageClassification", "SEQ_CLS", None, "ViTForImageClassification"),
        (Gemma3Config, "Gemma3ForConditionalGeneration", "CAUSAL_LM", None, "Gemma3ForConditionalGeneration"),
        (Qwen2VLConfig, "Qwen2VLForConditionalGeneration", "CAUSAL_LM", None, "Qwen2VLForConditionalGeneration"),
    ],
)
def test_the_checkpoints_class_unless_it_is_for_another_task(config, stored, task, head, expected):
    assert choose_model_class(config(architectures=[stored]), task, head).__name__ == expected


@pytest.mark.parametrize("architectures", [None, [], ["MyOwnModel"]])
def test_a_class_that_transformers_does_not_have(architectures):
    with pytest.raises(ValueError, match=r"`model_class`, such as AutoModelForSequenceClassification"):
        choose_model_class(BertConfig(architectures=architectures))


def test_backbones_have_no_head():
    assert is_headless("BertModel") and is_headless("ViTModel") and is_headless("T5Model")
    assert not is_headless("BertForMaskedLM") and not is_headless("LlamaForCausalLM")


def test_modules_that_clients_train_in_full_stay_floats():
    cls, config = SMALL_MODELS["bert"]
    assert list_float_modules(config, cls, None) is None
    assert list_float_modules(config, cls, ["classifier"]) is None  # a head anyway
    assert list_float_modules(config, cls, ["pooler"]) == ["bert.pooler", "classifier"]
