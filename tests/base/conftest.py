# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Full models of eight architectures, and their bases."""

import json
import shutil

import pytest
import torch
from torch import nn

from fedlpp_hf.base.export import export_base
from tests.helpers import SMALL_MODELS


@pytest.fixture(scope="session")
def full_model(tmp_path_factory):
    """A function from a name to the directory of that full model."""
    root = tmp_path_factory.mktemp("owners-secret-place")

    def build(name):
        directory = root / name
        if not directory.exists():
            model_class, config = SMALL_MODELS[name]
            torch.manual_seed(0)
            model = model_class(config)
            for parameter in model.parameters():  # biases and norms start as zeros and ones, where errors don't show
                nn.init.normal_(parameter.data, 0.1, 0.2)
            model.save_pretrained(directory)
            (directory / "README.md").write_text("The owner's own words.")
            (directory / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(directory), "pad": "x"}))
        return directory

    return build


@pytest.fixture(scope="session")
def base(full_model, tmp_path_factory):
    """A function from a name and settings to the directory of an exported base."""
    root = tmp_path_factory.mktemp("bases")

    def export(name, **settings):
        directory = root / f"{name}-{sorted(settings.items())}"
        if not directory.exists():
            export_base(full_model(name), directory, **settings)
        return directory

    return export


@pytest.fixture
def copied(full_model, tmp_path):
    return shutil.copytree(full_model("llama"), tmp_path / "full")
