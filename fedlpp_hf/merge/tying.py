# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Weights that share one tensor: which they are, and the configuration with which they don't."""

from copy import deepcopy
from typing import Any

from transformers import PreTrainedModel

from ..base.modules import build_meta_model


_FLAG = "tie_word_embeddings"


def list_tied_groups(model: PreTrainedModel) -> list[list[str]]:
    """List the parameters that share one tensor each, the one which the others are tied to first.

    Pairs that have nothing to do with each other, as BERT's decoder and its bias, are groups of their own.
    """
    groups: dict[str, list[str]] = {}
    for copy, original in model.all_tied_weights_keys.items():
        group = groups.get(original) or groups.get(copy) or [original]
        group += [name for name in (original, copy) if name not in group]
        groups |= dict.fromkeys((original, copy), group)
    return [group for name, group in groups.items() if name == group[0]]


def untie_config(config: Any) -> tuple[Any, dict[str, Any]]:
    """Copy a configuration, and those in it, without tied weights. Returns it, and what is new in it as JSON values."""
    config = deepcopy(config)
    return config, _untie_config_(config)


def _untie_config_(config: Any) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None and (found := _untie_config_(inner)):
            changes[name] = found
    if getattr(config, _FLAG, False):
        setattr(config, _FLAG, False)
        changes[_FLAG] = False
    return changes


def check_untied(model: PreTrainedModel, config: Any, group: list[str], changed: str) -> PreTrainedModel:
    """Refuse weights that can't be told apart. Returns the model of the configuration without tied weights.

    Args:
        model: with tied weights.
        config: what [`untie_config`] made of its configuration.
        group: the weights that share a tensor.
        changed: the one that the adapter changes otherwise than the others.

    Raises:
        ValueError: if there are three or more, or the class ties them whatever its configuration says.
    """
    untied = build_meta_model(config, type(model))
    if len(group) > 2 or any(set(group) == set(other) for other in list_tied_groups(untied)):
        raise ValueError(
            f"The adapter changes `{changed}`, which {type(model).__name__} shares with "
            f"{', '.join(f'`{name}`' for name in sorted(set(group) - {changed}))}; they can't be told apart. Train an adapter "
            "without that target."
        )
    return untied
