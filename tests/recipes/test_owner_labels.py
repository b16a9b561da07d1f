# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Answers of batches, padded as they are, are those that the model gives to each row alone."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from .rows import WORDS


@pytest.fixture
def answer(load_recipe, tokenizer_dir, tmp_path, monkeypatch):
    def answer(task: str, model: Path, *flags: str, seed: int = 0) -> list[dict]:
        directory, rows, output = tmp_path / task, tmp_path / "rows.jsonl", tmp_path / f"{seed}.jsonl"
        shutil.copytree(model, directory, dirs_exist_ok=True)
        PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(directory)
        words = [" ".join(WORDS[: 1 + index % 5]) for index in range(11)]
        rows.write_text("".join(json.dumps({"text": text, "team": "a"}) + "\n" for text in words))
        flags = ("--task", task, "--model_name_or_path", str(directory), "--data", str(rows), *flags)
        flags += (
            "--output_file",
            str(output),
            "--batch_size",
            "4",
            "--seed",
            str(seed),
            "--prompt_column",
            "text",
        )
        monkeypatch.setattr(sys, "argv", ["owner_labels.py", *flags])
        load_recipe("owner_labels").main()
        return [json.loads(line) for line in output.read_text().splitlines()]

    return answer


def test_classes(answer, full_bert, tmp_path):
    found = answer("sequence_classification", full_bert)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sequence_classification")
    model = AutoModelForSequenceClassification.from_pretrained(full_bert).eval()
    for row in found:
        assert row["label"] == int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())
    assert len(found) == 11 and {row["team"] for row in found} == {"a"}


def test_completions(answer, full_llama, tmp_path):
    coldest = answer(
        "causal_lm", full_llama, "--temperature", "1e-4", "--max_length", "12", "--completion_column", "end"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "causal_lm")
    model = AutoModelForCausalLM.from_pretrained(full_llama).eval()
    for row in coldest:
        prompt = tokenizer(row["text"] + "\n", return_tensors="pt")["input_ids"]
        alone = model.generate(prompt, attention_mask=prompt.ne(-1), max_new_tokens=6, do_sample=False)
        expected = tokenizer.decode(alone[0, prompt.shape[1] :], skip_special_tokens=True)
        assert row["end"].split()[:6] == expected.split()[:6]
    drawn = [answer("causal_lm", full_llama, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_other_tasks_are_refused(answer, full_llama):
    with pytest.raises(ValueError, match="expected sequence_classification or causal_lm"):
        answer("summarization", full_llama)
