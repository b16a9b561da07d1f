# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Models of sentence-transformers: a transformer with modules around it, which have no weights (pooling, normalizing)."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..base.full_model import FullModel
from ..base.manifest import read_manifest, write_manifest
from ..client.checks import find_transformer


MODULES = "modules.json"
LABELS = ("label", "labels", "score", "scores")  # the columns that are no text
_CONFIG = ("num_labels", "id2label", "label2id", "problem_type")
_WEIGHTS = (".safetensors", ".bin")


def is_sentence_trainer(trainer_class: type) -> bool:
    """Whether a trainer is one of sentence-transformers, which need not be installed."""
    return any(parent.__module__.startswith("sentence_transformers.") for parent in trainer_class.__mro__)


def load_sentence_model(
    trainer_class: Any, directory: str, transformer: Any = None, **options: Any
) -> torch.nn.Module:
    """Load the model that a trainer of sentence-transformers trains.

    Args:
        trainer_class: Of the trainer; it knows its model's class.
        directory: Of the model, or its name on the Hub.
        transformer: Takes the place of the one that is loaded.
        options: For the transformer's `from_pretrained`.

    Raises:
        ValueError: for a base with modules that are not of sentence-transformers.
    """
    config = {name: options.pop(name) for name in _CONFIG if name in options}
    if transformer is not None:
        described = Path(directory) / MODULES
        for folder in _list_folders(described) if described.is_file() else ():
            if folder.endswith("Pooling") and not (Path(directory) / folder / "config.json").is_file():
                raise ValueError(
                    f"The base in `{directory}` has no `{folder}/config.json`: `fedlpp-hf quantize` writes "
                    "the transformer alone. Name the full model instead of the base, or copy that file into it."
                )
        # The heads that the base does not have are floats.
        config["quantization_config"] = transformer.config.quantization_config.to_dict()
    model = trainer_class.model_class(directory, device="cpu", model_kwargs=options, config_kwargs=config)
    if transformer is not None:
        model.set_submodule(find_transformer(model), transformer)
    return model


def list_module_configs(source: FullModel) -> dict[str, Path]:
    """The files that describe the modules around the transformer of a model, by their place in its directory.

    Raises:
        ValueError: if one of the modules has weights, which a base does not hold.
    """
    described = source.list_companions([MODULES])
    configs: dict[str, Path] = {}
    for folder in _list_folders(described[0]) if described else ():
        weights = sorted(path.name for path in (source.directory / folder).glob("*") if path.suffix in _WEIGHTS)
        if weights:
            raise ValueError(
                f"`{source.model}` has weights outside its transformer (`{folder}/{weights[0]}`), which a base does not hold. "
                "Use a model whose other modules have no weights, such as pooling and normalizing."
            )
        name = f"{folder}/config.json"
        for path in source.list_companions([name]):
            configs[name] = path
    return configs


def copy_configs(configs: Mapping[str, Path], base_dir: Path) -> None:
    """Copy what [`list_module_configs`] found into the directory of the transformer's base, whose manifest then lists it."""
    if not configs:
        return
    manifest = read_manifest(base_dir)
    for name, path in configs.items():
        (base_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, base_dir / name)
    write_manifest(base_dir, manifest, {name: file["sha256"] for name, file in manifest["files"].items()})


def _list_folders(described: Path) -> list[str]:
    """The folders of the modules around a transformer. They must be of sentence-transformers, and below the model's own.

    Raises:
        ValueError: naming one that is not.
    """
    folders = []
    for module in json.loads(described.read_text(encoding="utf-8")):
        kind, folder = str(module["type"]), Path(module["path"])
        if not kind.startswith("sentence_transformers.") or folder.is_absolute() or ".." in folder.parts:
            raise ValueError(
                f"`{described}` has the module `{kind}` in `{folder}`; expected a module of sentence-transformers in a folder "
                "below. Code of others is not run."
            )
        if module["path"]:
            folders.append(str(folder))
    return folders
