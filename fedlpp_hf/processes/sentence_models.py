# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Models of sentence-transformers: a transformer with modules around it, which have no weights (pooling, normalizing)."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..base.full_model import FullModel
from ..client.checks import find_transformer


MODULES = "modules.json"
_WEIGHTS = (".safetensors", ".bin")


def is_sentence_trainer(trainer_class: type) -> bool:
    """Whether a trainer is one of sentence-transformers, which need not be installed."""
    return any(parent.__module__.startswith("sentence_transformers.") for parent in trainer_class.__mro__)


def load_sentence_model(
    trainer_class: Any, directory: str, transformer: torch.nn.Module | None = None, **options: Any
) -> torch.nn.Module:
    """Load the model that a trainer of sentence-transformers trains.

    Args:
        trainer_class: Of the trainer; it knows its model's class.
        directory: Of the model, or its name on the Hub.
        transformer: Takes the place of the one that is loaded.
        options: For the transformer's `from_pretrained`.
    """
    model = trainer_class.model_class(directory, device="cpu", model_kwargs=options)
    if transformer is not None:
        model.set_submodule(find_transformer(model), transformer)
    return model


def copy_modules(source: FullModel, base_dir: Path) -> None:
    """Copy what describes the modules around the transformer into the directory of its base.

    Raises:
        ValueError: if one of them has weights, which a base does not hold.
    """
    described = source.list_companions([MODULES])
    modules = json.loads(described[0].read_text(encoding="utf-8")) if described else []
    for folder in (module["path"] for module in modules if module["path"]):
        weights = sorted(path.name for path in (source.directory / folder).glob("*") if path.suffix in _WEIGHTS)
        if weights:
            raise ValueError(
                f"`{source.model}` has weights outside its transformer (`{folder}/{weights[0]}`), which a base does not hold. "
                "Use a model whose other modules have no weights, such as pooling and normalizing."
            )
        for config in source.list_companions([f"{folder}/config.json"]):
            (base_dir / folder).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(config, base_dir / folder / "config.json")
