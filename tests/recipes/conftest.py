# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Recipes by their names, and a tokenizer of the words that their rows are made of."""

import importlib
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .rows import RECIPES, SCRIPTS, WORDS


@pytest.fixture
def load_recipe(monkeypatch):
    """Import a recipe by its name, as the owner's spawned process will do too."""
    # In front of everything, and gone afterwards: `recipes/` is no package.
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.syspath_prepend(str(RECIPES / "data"))
    yield importlib.import_module
    for name in (*SCRIPTS, "docstrings", "summaries"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A word tokenizer that adds <s> in front."""
    directory = tmp_path_factory.mktemp("recipes") / "tokenizer"
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return directory
