# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Trainers × models × what is trained: what test_every_trainer.py runs, and the table in docs/trainers.md.

`python -m tests.trainer.cases` prints the table.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    BertConfig,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from fedlpp_hf import FederatedConfig, FederatedMixin, FederatedTrainer
from tests.helpers import VOCABULARY, make_tokenizer


ROWS = 16  # for training, and as many to evaluate on
LENGTH = 8
_SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
CONFIGS = {
    "Llama": LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **_SIZE, **_IDS),
    "Bert": BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **_SIZE, pad_token_id=0),
    "ViT": ViTConfig(**_SIZE, image_size=16, patch_size=8),
    "T5": T5Config(
        vocab_size=VOCABULARY, d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    ),
    "Whisper": WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16,
        max_target_positions=32, decoder_start_token_id=2, begin_suppress_tokens=None, **_IDS,
    ),
}  # fmt: skip


# --- Rows: something that a tiny model can learn.
def make_ids(seed: int) -> np.ndarray:
    start = np.random.default_rng(seed).integers(2, VOCABULARY - LENGTH, (ROWS, 1))
    return start + np.arange(LENGTH)


def make_words(ids: np.ndarray) -> list[str]:
    return [" ".join(f"w{number}" for number in row) for row in ids]


def make_rows(kind: str, seed: int) -> Dataset:
    """Rows of one kind, a function of `seed`."""
    ids = make_ids(seed)
    text = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    side = ids[:, 0] >= VOCABULARY // 2
    words = make_words(ids)
    preference = {
        "prompt": make_words(ids[:, :3]),
        "chosen": [f" {row}" for row in make_words(ids[:, 3:])],
        "rejected": [f" {row}" for row in make_words(np.flip(ids, axis=1)[:, 3:])],
    }
    chat = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": two.strip()}]
        for one, two in zip(preference["prompt"], preference["chosen"], strict=True)
    ]
    sound = np.random.default_rng(seed).normal(size=(ROWS, 8, 32)).astype(np.float32) + side[:, None, None]
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "language": lambda: text | {"labels": ids.tolist()},
        "masked": lambda: text,
        "classes": lambda: text | {"labels": side.astype(int).tolist()},
        "values": lambda: text | {"labels": (ids[:, 0] / VOCABULARY).tolist()},
        "sets": lambda: text | {"labels": np.stack([side, ~side, ids[:, 0] % 2 == 0], 1).astype(np.float32).tolist()},
        "tokens": lambda: text | {"labels": (ids % 3).tolist()},
        "spans": lambda: text | {"start_positions": side.astype(int).tolist(), "end_positions": (side + 2).tolist()},
        "images": lambda: {"pixel_values": sound[:, :3, :16, None].repeat(16, 3), "labels": side.astype(int).tolist()},
        "sounds": lambda: {"input_features": sound, "labels": ids[:, :4].tolist()},
        "texts": lambda: {"text": words},
        "chats": lambda: {"messages": chat},
        "preferences": lambda: preference,
        "prompts": lambda: {"prompt": preference["prompt"]},
        "judged": lambda: {
            "prompt": [*preference["prompt"], *preference["prompt"]],
            "completion": [*preference["chosen"], *preference["rejected"]],
            "label": [True] * ROWS + [False] * ROWS,
        },
        "pairs": lambda: {"anchor": words, "positive": make_words(ids[:, 3:])},
    }
    return Dataset.from_dict(kinds[kind]())


# --- What trainers are given.
def count_right(prediction: Any) -> dict[str, float]:
    scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((scores.argmax(-1) == prediction.label_ids).mean())}


def count_generated(prediction: Any) -> dict[str, float]:
    """Of text that was generated after the start token: the share of right tokens."""
    texts, labels = prediction.predictions[:, 1:], prediction.label_ids
    width = min(texts.shape[1], labels.shape[1])
    counted = labels[:, :width] > 1
    return {"accuracy": float((texts[:, :width] == labels[:, :width])[counted].mean())}


def measure_values(prediction: Any) -> dict[str, float]:
    return {"mse": float(((prediction.predictions.squeeze(-1) - prediction.label_ids) ** 2).mean())}


def measure_sets(prediction: Any) -> dict[str, float]:
    return {"f1": float(((prediction.predictions > 0) == (prediction.label_ids > 0.5)).mean())}


def reward_small_words(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A toy reward: the share of words from the first half of the vocabulary."""
    return [sum(token < VOCABULARY // 2 for token in ids) / len(ids) for ids in completion_ids]


CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + ' <eos>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)


@functools.cache
def federate(config: type, trainer: type) -> tuple[type, type]:
    """Config and trainer, federated as the README says."""
    return (
        dataclass(type(f"Federated{config.__name__}", (config, FederatedConfig), {})),
        type(f"Federated{trainer.__name__}", (FederatedMixin, trainer), {}),
    )


def find_trainer(name: str) -> tuple[type, type]:
    """The federated config and trainer by the trainer's name; skips the test where the library is not installed."""
    import pytest

    if name == "Trainer":
        return FederatedConfig, FederatedTrainer
    if name == "Seq2SeqTrainer":
        return federate(Seq2SeqTrainingArguments, Seq2SeqTrainer)
    if name == "SentenceTransformerTrainer":
        library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
        return federate(library.SentenceTransformerTrainingArguments, library.SentenceTransformerTrainer)
    trl = pytest.importorskip("trl", reason="needs the extra [trl]")
    if name in ("ORPOTrainer", "CPOTrainer"):
        trl = pytest.importorskip(f"trl.experimental.{name.removesuffix('Trainer').lower()}")
    return federate(getattr(trl, name.replace("Trainer", "Config")), getattr(trl, name))


@dataclass(frozen=True)
class Case:
    """One row of the table: a trainer, a checkpoint, and what is trained on it.

    `stored` is the class of the checkpoint, `loaded` the class that is trained, the same unless given; `new` what the
    checkpoint does not have. `headline` is the metric to show.
    """

    trainer: str
    stored: str
    rows: str
    headline: str
    task: str | None = None
    loaded: str = ""
    new: str = ""
    note: str = ""
    lora: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    learns: bool = True  # whether its loss falls in two short rounds

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.trainer, self.loaded or self.stored, self.new, self.note))).replace(
            " ", "_"
        )

    @property
    def with_owner(self) -> bool:
        """Whether it says more of the owner's process than a case before."""
        return self.note in ("", "regression", "several labels") and self.trainer not in ("CPOTrainer", "RLOOTrainer")

    @property
    def family(self) -> str:
        return next(family for family in CONFIGS if self.stored.startswith(family))

    @property
    def peft_config(self) -> LoraConfig:
        targets = {"Bert": ["query", "value"], "T5": ["q", "v"]}.get(self.family, ["q_proj", "v_proj"])
        return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": self.task, **self.lora})

    def build_model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return getattr(transformers, self.stored)(CONFIGS[self.family])

    def make_arguments(self) -> dict[str, Any]:
        """The trainer's own arguments: each test has a tokenizer to itself, since TRL changes it."""
        given = dict(self.arguments)
        if "loss" in given:  # a class, which each process calls with its own model
            given["loss"] = getattr(importlib.import_module("sentence_transformers.losses"), given["loss"])
        if self.rows in ("texts", "chats", "preferences", "prompts", "judged"):
            given["processing_class"] = make_tokenizer()
            given["processing_class"].chat_template = CHAT_TEMPLATE
        if self.rows == "masked":
            tokenizer = make_tokenizer()
            tokenizer.add_special_tokens({"mask_token": "w2"})
            given["data_collator"] = DataCollatorForLanguageModeling(tokenizer)
        return given


def list_cases() -> list[Case]:
    """All cases, in the order of the table."""
    labels = {"model_init_kwargs": {"num_labels": 3}}
    generate = {"predict_with_generate": True, "generation_max_length": 6}
    online = {"max_completion_length": 6, "num_generations": 2, "num_generations_eval": 2, "learning_rate": 1e-1}
    reward = {"reward_funcs": reward_small_words}
    right = {"compute_metrics": count_right}
    short = {"max_length": 16}
    save = {"modules_to_save": ["classifier"]}
    return [
        Case("Trainer", "LlamaForCausalLM", "language", "eval_loss", "CAUSAL_LM"),
        Case("Trainer", "BertForMaskedLM", "masked", "eval_loss", learns=False),
        Case("Trainer", "BertForSequenceClassification", "classes", "eval_accuracy", "SEQ_CLS", arguments=right),
        Case("Trainer", "BertModel", "classes", "eval_accuracy", "SEQ_CLS", "BertForSequenceClassification", "classifier",
             arguments=right),
        Case("Trainer", "BertForMaskedLM", "classes", "eval_accuracy", "SEQ_CLS", "BertForSequenceClassification",
             "pooler and classifier", lora={"modules_to_save": ["pooler", "classifier"]}, arguments=right),
        Case("Trainer", "LlamaForCausalLM", "classes", "eval_accuracy", "SEQ_CLS", "LlamaForSequenceClassification",
             "score", arguments=right),
        Case("Trainer", "BertModel", "values", "eval_mse", "SEQ_CLS", "BertForSequenceClassification", "classifier",
             "regression", arguments={"model_init_kwargs": {"num_labels": 1}, "compute_metrics": measure_values}),
        Case("Trainer", "BertModel", "sets", "eval_f1", "SEQ_CLS", "BertForSequenceClassification", "classifier",
             "several labels", arguments={
                 "model_init_kwargs": {"num_labels": 3, "problem_type": "multi_label_classification"},
                 "compute_metrics": measure_sets}),
        Case("Trainer", "BertForMaskedLM", "tokens", "eval_accuracy", "TOKEN_CLS", "BertForTokenClassification",
             "classifier", arguments=right | labels),
        Case("Trainer", "BertModel", "spans", "eval_loss", "QUESTION_ANS", "BertForQuestionAnswering", "qa_outputs",
             lora={"modules_to_save": ["qa_outputs"]}, arguments={}),
        Case("Trainer", "ViTForImageClassification", "images", "eval_accuracy", lora=save, arguments=right),
        Case("Trainer", "ViTModel", "images", "eval_accuracy", None, "ViTForImageClassification", "classifier",
             lora=save, arguments=right | {"model_class": transformers.AutoModelForImageClassification}),
        Case("Seq2SeqTrainer", "T5ForConditionalGeneration", "language", "eval_accuracy", "SEQ_2_SEQ_LM",
             options=generate, arguments={"compute_metrics": count_generated}),
        Case("Seq2SeqTrainer", "WhisperForConditionalGeneration", "sounds", "eval_accuracy", options=generate,
             arguments={"compute_metrics": count_generated}),
        Case("SFTTrainer", "LlamaForCausalLM", "texts", "eval_mean_token_accuracy", "CAUSAL_LM", options=short),
        Case("SFTTrainer", "LlamaForCausalLM", "texts", "eval_mean_token_accuracy", "CAUSAL_LM", note="packing",
             options={"max_length": 20, "packing": True, "eval_packing": False}),
        Case("SFTTrainer", "LlamaForCausalLM", "chats", "eval_mean_token_accuracy", "CAUSAL_LM",
             note="assistant only", options=short | {"assistant_only_loss": True}),
        Case("DPOTrainer", "LlamaForCausalLM", "preferences", "eval_rewards/accuracies", "CAUSAL_LM", options=short),
        Case("DPOTrainer", "LlamaForCausalLM", "preferences", "eval_rewards/accuracies", "CAUSAL_LM",
             note="reference computed before", options=short | {"precompute_ref_log_probs": True}),
        Case("KTOTrainer", "LlamaForCausalLM", "judged", "eval_loss", "CAUSAL_LM", options=short),
        Case("ORPOTrainer", "LlamaForCausalLM", "preferences", "eval_rewards/accuracies", "CAUSAL_LM",
             options=short | {"max_completion_length": 8}),
        Case("CPOTrainer", "LlamaForCausalLM", "preferences", "eval_rewards/accuracies", "CAUSAL_LM",
             options=short | {"max_completion_length": 8}),
        Case("RewardTrainer", "LlamaForCausalLM", "preferences", "eval_accuracy", "SEQ_CLS",
             "LlamaForSequenceClassification", "score", options=short),
        Case("GRPOTrainer", "LlamaForCausalLM", "prompts", "eval_reward", "CAUSAL_LM", options=online | {"beta": 0.01},
             arguments=reward, learns=False),
        Case("RLOOTrainer", "LlamaForCausalLM", "prompts", "eval_reward", "CAUSAL_LM", options=online, arguments=reward,
             learns=False),
        Case("SentenceTransformerTrainer", "BertModel", "pairs", "eval_loss", "FEATURE_EXTRACTION", arguments={
            "loss": "MultipleNegativesRankingLoss"}),
    ]  # fmt: skip


def render_table() -> str:
    """The table of docs/trainers.md."""
    lines = ["| trainer | checkpoint | trained as | trained | headline of the report |", "|---|---|---|---|---|"]
    for case in list_cases():
        trained = ["LoRA"] + ([f"new `{case.new.replace(' and ', '`, `')}`"] if case.new else [])
        if not case.new:
            trained += [f"`{name}`" for name in case.lora.get("modules_to_save", ())]
            trained += ["`classifier`"] if case.task == "SEQ_CLS" else []
        name = f"`{case.trainer}`" + (" (TRL's experimental)" if case.trainer in ("ORPOTrainer", "CPOTrainer") else "")
        trainer = f"{name}, {case.note}" if case.note else name
        loaded = case.loaded or case.stored
        lines.append(f"| {trainer} | {case.stored} | {loaded} | {', '.join(trained)} | `{case.headline}` |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(render_table())
