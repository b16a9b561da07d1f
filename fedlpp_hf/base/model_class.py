# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The class that a checkpoint is loaded as, the same for the full model and for the base."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from .manifest import write_json
from .modules import build_meta_model, default_skip_modules, list_linears


_NOT_STORED = ("dtype", "torch_dtype", "_attn_implementation", "attn_implementation")  # they say how it runs
# What PEFT's task types stand for.
_CLASSES = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "FEATURE_EXTRACTION": modeling_auto.MODEL_MAPPING_NAMES,
}


def choose_model_class(config: Any, task: str | None = None, head: str | None = None) -> Any:
    """Choose the class of a checkpoint: the one that its configuration names, unless it is no model for `task`.

    Args:
        config: The checkpoint's configuration.
        task: A task type of PEFT, such as SEQ_CLS; None where nothing names one.
        head: The same, for a checkpoint without a head.

    Raises:
        ValueError: if transformers does not have the class.
    """
    named = (config.architectures or [""])[0]
    if task is None and is_headless(named):
        task = head
    wanted = _CLASSES.get(task or "", {})
    fitting = _as_names(wanted.get(config.model_type))
    # A model of another modality, such as Whisper, may be right for a task that has no list for it.
    name = named if not fitting or named in _all_names(wanted) else fitting[0]
    found = getattr(transformers, name, None) if name else None
    if found is None:
        raise ValueError(
            f"The configuration names the class {named or 'of no model'}, which transformers {transformers.__version__} "
            "does not have. Pass `model_class`, such as AutoModelForSequenceClassification (code from the Hub is not run)."
        )
    return found


def is_headless(name: str) -> bool:
    """Whether the class of this name is a backbone without a head, which computes no loss."""
    return "For" not in name and name in _all_names(modeling_auto.MODEL_MAPPING_NAMES)


def list_float_modules(config: Any, model_class: Any, trained: Collection[str] | None) -> list[str] | None:
    """List the modules that a base keeps as floats, where clients train more than its heads in full.

    Args:
        config: The checkpoint's configuration.
        model_class: Its class.
        trained: What ends the names of the modules that clients train, as in PEFT's `modules_to_save`.

    Returns:
        Their names, or None where the heads are enough.
    """
    if not trained:
        return None
    model = build_meta_model(config, model_class)
    heads = set(default_skip_modules(model))
    found = {
        place for place, module in model.named_modules() if place.endswith(tuple(trained)) and list_linears(module)
    }
    return None if found <= heads else sorted(heads | found)


def change_config(directory: Path, values: Mapping[str, Any]) -> None:
    """Change the configuration of a model in a directory as `from_pretrained` would by the same arguments."""
    file = directory / "config.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    before = AutoConfig.from_pretrained(directory).to_dict()
    after = AutoConfig.from_pretrained(directory, return_unused_kwargs=True, **values)[0].to_dict()
    changes = {name: value for name, value in after.items() if name not in _NOT_STORED and before.get(name) != value}
    if changes:
        write_json(file, stored | json.loads(json.dumps(changes)))


def _as_names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _all_names(mapping: Any) -> set[str]:
    return {name for value in mapping.values() for name in _as_names(value)}
