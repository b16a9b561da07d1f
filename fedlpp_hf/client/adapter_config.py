# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which adapters a federation can train, told from their configuration, before a model is loaded."""

from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType


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


def check_adapter_config(config: PeftConfig) -> None:
    """Refuse an adapter that a federation can't train, average, or merge into the full model.

    Raises:
        ValueError: naming the option, its value, and what to use.
    """
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
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


def _is_default(config: PeftConfig, option: Any) -> bool:
    value = getattr(config, option.name)
    default = option.default if option.default_factory is MISSING else option.default_factory()
    return value == default or not value
