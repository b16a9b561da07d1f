# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""PEFT's own merge, for adapters that are more than s·B·A: correct, but the whole model is in memory."""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..base.full_model import FullModel
from ..base.shards import WEIGHTS_INDEX
from ..tensors.adapters import check_keys
from .adapter_reader import AdapterReader
from .destination import check_room, scratch_directory
from .peft_models import AdaptedModel
from .sizes import parameter_name
from .tying import check_untied, list_tied_groups, untie_config


logger = logging.get_logger(__name__)


def check_alone(reason: str, count: int, has_base: bool, source: FullModel) -> None:
    """Refuse what PEFT's own merge can't do.

    Args:
        reason: why PEFT has to merge.
        count: of the adapters.
        has_base: whether a base was given.
        source: the full model.

    Raises:
        ValueError: for several adapters, a base, or shards that are to be deleted.
    """
    if count > 1 or has_base or source.scratch is not None:
        raise ValueError(
            f"The adapter needs PEFT's own merge ({reason}), which merges one adapter into W, in memory. Leave out the "
            "other adapters, base_dir and delete_source_shards."
        )


def merge_through_peft(
    reason: str, source: FullModel, adapted: AdaptedModel, reader: AdapterReader, work: Path
) -> None:
    """Load the full model, let PEFT merge the adapter, and save into a directory.

    Args:
        reason: why PEFT merges, for a warning.
        source: the full model.
        adapted: the model that the adapter was trained on.
        reader: the adapter.
        work: the directory.

    Raises:
        ValueError: if the adapter does not fit the model, or the result is not finite.
        OSError: if there is too little room.
    """
    check_room(work, source.size)
    gigabytes = source.size / 1e9
    logger.warning(f"Merging through PEFT, because {reason}: the whole model, {gigabytes:.1f} GB, is held in memory.")
    model = _load_full_model(source, adapted, work)
    damaged = _list_damaged(model)
    weights = {id(parameter) for parameter in model.parameters()}
    try:
        peft_model = PeftModel.from_pretrained(model, reader.directory, config=deepcopy(reader.config))
    except Exception as error:  # of whatever PEFT does with a configuration
        raise ValueError(
            f"PEFT can't load the adapter in `{reader.directory}` ({error}). Load and save it again."
        ) from error
    if not adapted.peft_models:  # of others the keys are checked
        known = adapted.model.state_dict()
        given, expected = (
            [key for key in keys if parameter_name(key) not in known]
            for keys in (reader.keys, get_peft_model_state_dict(peft_model, save_embedding_layers=False))
        )
        check_keys(given, expected)
    _give_each_its_own_(peft_model, weights)
    _settle_layers_(peft_model, getattr(adapted.config.get_text_config(), "num_hidden_layers", 0))
    try:
        merged = peft_model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"PEFT can't merge the adapter in `{reader.directory}` ({type(error).__name__}: {error})."
        ) from error
    fresh = sorted(_list_damaged(merged) - damaged)
    if fresh:
        raise ValueError(f"`{fresh[0]}` would have values that are NaN or infinite after the merge.")
    _settle_ties_(merged, adapted)
    source.copy_companions(work)
    merged.save_pretrained(work)


def _load_full_model(source: FullModel, adapted: AdaptedModel, work: Path) -> PreTrainedModel:
    """Load the full model with the adapter's numbers of labels and tokens.

    From a directory of links: there may be an adapter beside the model, which `from_pretrained` would load, too.
    """
    links = scratch_directory(work)
    links.mkdir(exist_ok=True)
    names = ["config.json", "generation_config.json", WEIGHTS_INDEX]
    for path in [*source.list_companions(names), *map(source.fetch, source.shards)]:
        os.symlink(path.resolve(), links / path.name)
    config = deepcopy(adapted.config)
    if adapted.tokens is not None:  # first the vocabulary that is stored
        config.get_text_config().vocab_size = adapted.tokens[0]
    try:
        model = type(adapted.model).from_pretrained(
            links, config=config, dtype="auto", ignore_mismatched_sizes="id2label" in adapted.config_changes
        )
    except RuntimeError as error:
        raise ValueError(f"`{source.model}` can't be loaded ({error}).") from error
    if adapted.tokens is not None:
        model.resize_token_embeddings(adapted.tokens[1], mean_resizing=False)  # the adapter has all of it
    return model


def _list_damaged(model: nn.Module) -> set[str]:
    return {
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    }


def _give_each_its_own_(peft_model: PeftModel, weights: set[int]) -> None:
    """Copy weights of the model that modules share: a merge into one must not change the other.

    Args:
        peft_model: the model with the adapter.
        weights: the ids of the model's own parameters.
    """
    seen: set[int] = set()
    for module in peft_model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen and id(parameter) in weights:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


def _settle_layers_(peft_model: PeftModel, before: int) -> None:
    """Write replicated layers into the configuration, which after the merge have their own weights.

    Args:
        peft_model: the model with the adapter.
        before: the number of the full model's layers.
    """
    peft_config = peft_model.peft_config["default"]
    replication = getattr(peft_config, "layer_replication", None)
    if not replication:
        return
    peft_config.layer_replication = None  # a merge into shared weights would be refused
    order = [layer for start, stop in replication for layer in range(start, stop)]
    config = peft_model.get_base_model().config.get_text_config()
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == before:  # one entry a layer
            setattr(config, name, [value[layer] for layer in order])


def _settle_ties_(merged: PreTrainedModel, adapted: AdaptedModel) -> None:
    """Tie again what is the same, and untie in the configuration what is not.

    Raises:
        ValueError: if weights can't be told apart that are no longer the same.
    """
    state, config = merged.state_dict(), merged.config
    groups = list_tied_groups(adapted.model)
    odd = {}
    for group in groups:
        other = next((name for name in group[1:] if not torch.equal(state[name], state[group[0]])), None)
        if other is not None:
            odd[tuple(group)] = other
    untied, changes = untie_config(adapted.config)
    for names, name in odd.items():
        check_untied(adapted.model, untied, list(names), name)
    _set_flags_(config, changes, not odd)
    if not odd:
        merged.tie_weights()
        return
    changed = " and ".join(f"`{name}`" for names in odd for name in names)
    logger.warning(f"The adapter changes {changed}, which were tied, differently; they are untied.")


def _set_flags_(config: Any, changes: dict[str, Any], tied: bool) -> None:
    for name, value in changes.items():
        if isinstance(value, dict):
            _set_flags_(getattr(config, name), value, tied)
        else:
            setattr(config, name, tied)
