# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Whole runs of the recipes on tiny models."""

import json
import sys

import pytest
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from .rows import write_rows


pytest.importorskip("sklearn")
pytestmark = pytest.mark.timeout(600)


def test_warmup_and_classification(load_recipe, tokenizer_dir, tmp_path, monkeypatch):
    owner, out, rows = tmp_path / "owner", tmp_path / "out", tmp_path / "rows.jsonl"
    write_rows(rows, 48)
    model = BertConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    BertModel(model).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "model")
    common = ["--train_data", str(rows), "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]
    flags = ["--task", "sequence_classification", "--model_name_or_path", str(tmp_path / "model"), *common]
    flags += ["--output_dir", str(owner), "--max_steps", "4", "--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", ["owner_warmup.py", *flags])
    load_recipe("owner_warmup").main()
    assert not list(owner.glob("*.bin"))

    flags = ["--model_name_or_path", str(owner), "--eval_data", str(rows), *common, "--output_dir", str(out)]
    flags += ["--partition", "team", "--num_rounds", "2", "--max_steps", "3", "--learning_rate", "1e-2"]
    flags += ["--base_bits", "4", "--adapter_block_size", "64"]
    monkeypatch.setattr(sys, "argv", ["sequence_classification.py", *flags])
    load_recipe("sequence_classification").main()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [len(record["clients"]) for record in records] == [0, 3, 3]
    assert records[-1]["metrics"]["server"]["eval_loss"] < records[0]["metrics"]["server"]["eval_loss"]
    assert {"eval_accuracy", "eval_macro_f1"} <= set(records[-1]["metrics"]["proxy"])
    assert (out / "report.md").is_file() and (out / "_merged" / "model.safetensors").is_file()


def test_clients_by_labels_are_refused(load_recipe, tokenizer_dir, tmp_path, monkeypatch):
    flags = ["--model_name_or_path", str(tokenizer_dir), "--train_data", "x.jsonl", "--eval_data", "x.jsonl"]
    flags += ["--output_dir", str(tmp_path), "--use_cpu", "true", "--partition", "dirichlet"]
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", *flags])
    with pytest.raises(ValueError, match="Rename it"):
        load_recipe("causal_lm").main()


def test_causal_lm_from_a_base(load_recipe, tokenizer_dir, llama_base, tmp_path, monkeypatch):
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    write_rows(rows, 24)
    base.symlink_to(llama_base)
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda name: PreTrainedTokenizerFast.from_pretrained(tokenizer_dir),
    )
    flags = ["--model_name_or_path", str(base), "--train_data", str(rows), "--eval_data", str(rows)]
    flags += ["--prompt_column", "act", "--partition", "team", "--num_rounds", "2", "--max_steps", "3"]
    flags += ["--learning_rate", "1e-2", "--lora_r", "4", "--output_dir", str(tmp_path / "out")]
    flags += ["--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true", "--max_eval_rows", "12"]
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", *flags])
    load_recipe("causal_lm").main()
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["metrics"]["proxy"]["eval_loss"] for record in records]
    assert losses[-1] < losses[0]
