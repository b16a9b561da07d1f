# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The lines of a model card that load the model, with its class."""

import json
import os
from pathlib import Path
from typing import Any

from ..merge.task_classes import find_auto_class
from ..server.store import FEDERATION_DIR
from ..tensors.lora import read_shapes
from ..tensors.names import ADAPTER_CONFIG


_CONFIG = "config.json"
_HEADS = ("classifier", "score", "classification_head", "qa_outputs")


def describe_loading(directory: Path, repo_id: str, source: str | os.PathLike | None, federation: Path | None) -> str:
    """Write Python that loads a merged model, or an adapter on the full model.

    Args:
        directory: the merged model, or a PEFT repository.
        repo_id: the repository that it is pushed to.
        source: the full model (directory or Hub id).
        federation: the federation's `output_dir`, with the base that the adapter was trained on.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        name = _read_architecture(directory) or "AutoModel"
        return _quote(f"from transformers import {name}", "", f'model = {name}.from_pretrained("{repo_id}")')
    name = _find_class(directory, source, federation)
    full_model = source if source is not None and not Path(source).is_dir() else "the full model"
    labels = _count_labels(directory) if "Classification" in name else None
    more = f", num_labels={labels}" if labels else ""
    return _quote(
        "from peft import PeftModel",
        f"from transformers import {name}",
        "",
        f'model = {name}.from_pretrained("{full_model}"{more})',
        f'model = PeftModel.from_pretrained(model, "{repo_id}")',
    )


def _find_class(directory: Path, source: str | os.PathLike | None, federation: Path | None) -> str:
    """The class that an adapter is loaded on: its task's, or else that of the model it was trained on."""
    config = _read_json(directory / ADAPTER_CONFIG)
    found = find_auto_class(config) or (config.get("auto_mapping") or {}).get("base_model_class")
    if found is None and federation is not None:
        found = _read_architecture(federation / FEDERATION_DIR / "base")
    if found is None and source is not None:
        found = _read_architecture(Path(source))
    return found or "AutoModel"


def _read_architecture(directory: Path) -> str | None:
    return next(iter(_read_json(directory / _CONFIG).get("architectures") or []), None)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _count_labels(directory: Path) -> int | None:
    """The rows of the head that an adapter has whole: without them `from_pretrained` would make a head of another size."""
    heads = [
        tensor.shape
        for key, tensor in sorted(read_shapes(directory).items())
        if ".lora_" not in key and key.endswith(".weight") and any(f".{head}." in key for head in _HEADS)
    ]
    # The last layer of a head of several comes last by name: dense, out_proj.
    return heads[-1][0] if heads else None


def _quote(*lines: str) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"
