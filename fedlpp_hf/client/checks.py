# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Is a model an adapter on a quantized base, and nothing else?"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.utils import logging

from ..base.manifest import BASE_MANIFEST, read_manifest
from ..tensors.adapters import adapter_parameters


logger = logging.get_logger(__name__)


def check_model(model: Any, allow_full_precision: bool = False) -> None:
    """Refuse a model that is not an adapter on a quantized base.

    Raises:
        ValueError: if there is no adapter, the base is not quantized, or anything but the adapter is trainable.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"The model is a {type(model).__name__} without an adapter; a client trains nothing but LoRA. "
            "Pass `peft_config=LoraConfig(...)`, or a PeftModel."
        )
    adapter = {id(parameter) for parameter in adapter_parameters(model).values()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapter]
    if trainable:
        raise ValueError(
            f"`{trainable[0]}` is trainable and {len(trainable) - 1} more outside the adapter; a client may only "
            "train LoRA factors and `modules_to_save`."
        )
    if allow_full_precision:
        return
    linears = full_precision_linears(model)
    if linears is None:
        name = getattr(model.get_base_model().config, "_name_or_path", "") or type(model.get_base_model()).__name__
        raise ValueError(
            f"model='{name}' is a full-precision checkpoint; clients may only load a quantized base. Run `fedlpp-hf "
            f"quantize {name} base/` and load `base/`, pass `quantization_config`, or name it as `full_model` so that "
            "the owner's process exports the base."
        )
    if linears:
        logger.warning(
            f"{len(linears)} linear layers of the base are in full precision ({', '.join(linears[:3])}). Whoever holds "
            "this base holds them. A base written by `fedlpp-hf quantize` does not have this leak."
        )


def full_precision_linears(model: Any) -> list[str] | None:
    """Names of the base's linear layers that hold full-precision weights; None if the base has no quantized layer."""
    import bitsandbytes as bnb  # heavy, and not needed to import the package

    base = model.get_base_model()
    quantized = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    if not any(isinstance(module, quantized) for module in base.modules()):
        return None
    manifest = find_manifest(model)
    if manifest is not None:  # it knows what `export_base` reduced of the layers that bitsandbytes leaves alone
        return manifest["full_precision_linears"]
    trained = ("lora_", "modules_to_save", "original_module")
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not isinstance(module, quantized)
        and not any(part in name for part in trained)
    ]


def find_manifest(model: Any) -> dict[str, Any] | None:
    """The manifest of the base that the model was loaded from, if it was loaded from a directory that has one."""
    directory = getattr(model.get_base_model().config, "_name_or_path", "")
    return read_manifest(directory) if directory and (Path(directory) / BASE_MANIFEST).is_file() else None
