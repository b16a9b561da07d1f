# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which adapters a federation can train, told from their configuration, and whether a model has what they name."""

import copy
from dataclasses import MISSING, fields
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from transformers.pytorch_utils import Conv1D

from ..config.spelling import suggest


# Starts of A and B that leave the base's weights as they are, and need no data. False draws B at random, too.
_INITS = (True, False, "gaussian")
_REASONS = {
    "olora": "takes B·A out of the base's own weights, and the full model would keep what the base has lost",
    "pissa": "takes B·A out of the base's own weights, and the full model would keep what the base has lost",
    "corda": "takes B·A out of the base's own weights, and reads samples of data",
    "lora_ga": "takes B·A out of the base's own weights, and reads gradients on samples of data",
    "loftq": "needs the full-precision weights, and its B·A tells clients what the quantizer took from them",
    "eva": "reads samples of data, which the clients have and the owner has not",
    "mica": "needs the full-precision weights, and freezes B",
    "orthogonal": "stores A and B in the dtype of the base's weights, and their product is zero only until they are quantized",
}
# Options whose adapter is s·B·A of its factors, and what is trained in full beside them. A new option of PEFT is not
# among them before it was tried.
_OPTIONS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "fan_in_fan_out",
    "modules_to_save", "bias", "lora_bias", "use_dora", "trainable_token_indices", "ensure_weight_tying", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",  # of what is off
}  # fmt: skip
# What PEFT itself adds to `modules_to_save` for a classifier; a model has one of them.
TRAINED_HEADS = ("classifier", "score")


def check_adapter_config(config: PeftConfig) -> None:
    """Refuse an adapter that a federation can't train, average, or merge into the full model.

    Raises:
        ValueError: naming the option, its value, and what to use.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise ValueError(
            f"peft_config has the type {type(config).__name__}; expected LoraConfig. Clients' updates are averaged as LoRA's "
            "factors and merged as s·B·A, which this adapter is not."
        )
    init = config.init_lora_weights
    if init not in _INITS:
        reason = next((text for name, text in _REASONS.items() if str(init).startswith(name)), "is not known here")
        raise ValueError(
            f"init_lora_weights={init!r} does not go with a federation: it {reason}. Leave it at True, or set 'gaussian'."
        )
    for option in fields(config):
        if option.name not in _OPTIONS and not _is_default(config, option):
            raise ValueError(
                f"LoraConfig({option.name}={getattr(config, option.name)!r}) does not go with a federation, which averages and "
                "quantizes the factors A and B, and merges s·B·A. Leave the option out."
            )


def make_peft_model(model: Any, config: PeftConfig, **options: Any) -> PeftModel:
    """PEFT's `get_peft_model`, on a copy of the configuration.

    Raises:
        ValueError: where the model has no module of a name that the adapter gives; PEFT passes over those to save.
    """
    names = {name for name, _ in model.named_modules()}
    for wanted in config.modules_to_save or ():
        if wanted not in TRAINED_HEADS and not any(name.endswith(wanted) for name in names):
            nearest = suggest(wanted, {name.rpartition(".")[2] for name in names})
            raise ValueError(f"modules_to_save has {wanted!r}, and {type(model).__name__} has no such module{nearest}")
    linears = {
        name.rpartition(".")[2]: None
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }
    try:
        return get_peft_model(model, copy.deepcopy(config), **options)  # it writes the base's path into it
    except ValueError as error:
        if type(error).__name__ != "NoMatchingPeftModuleError":
            raise
        given = sorted(config.target_modules) if isinstance(config.target_modules, set) else config.target_modules
        raise ValueError(
            f"target_modules={given!r}: the adapter fits no module of {type(model).__name__}, whose linear layers are called "
            f"{', '.join(linears)}. Name some of them, or set target_modules='all-linear'. ({error})"
        ) from error


def _is_default(config: PeftConfig, option: Any) -> bool:
    value = getattr(config, option.name)
    default = option.default if option.default_factory is MISSING else option.default_factory()
    return value == default or not value
