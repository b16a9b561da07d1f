# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Is a model an adapter on a quantized base, and nothing else?"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.utils import logging

from ..base.heads import list_new_parameters
from ..base.manifest import BASE_MANIFEST, read_manifest
from ..tensors.adapters import adapter_parameters
from .adapter_config import check_adapter_config


logger = logging.get_logger(__name__)


ADAPTER = "default"  # the name that PEFT and TRL give an adapter


def find_peft_model(model: Any) -> PeftModel:
    """The PeftModel that a trainer trains: its model, or the one inside it, as in a SentenceTransformer.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    if isinstance(model, PeftModel):
        return model
    if len(found) != 1:
        raise ValueError(
            f"The model is a {type(model).__name__} with {len(found) or 'no'} adapters; a client trains nothing but LoRA. "
            "Pass `peft_config=LoraConfig(...)`, or a PeftModel."
        )
    return found[0]


def find_transformer(model: torch.nn.Module) -> str:
    """Where the model of transformers is: "" for the model itself, or its place inside, as in a SentenceTransformer.

    Raises:
        ValueError: if there is none, or more than one.
    """
    places = [place for place, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    if "" in places:
        return ""
    tops = [place for place in places if not any(place.startswith(f"{other}.") for other in places)]
    if len(tops) != 1:
        raise ValueError(
            f"The model is a {type(model).__name__} with {len(tops)} models of transformers inside; expected one, which gets "
            "the adapter."
        )
    return tops[0]


def check_model(model: Any, allow_full_precision: bool = False) -> None:
    """Refuse a model that is not an adapter on a quantized base.

    Raises:
        ValueError: if there is no adapter that a federation can train, anything but the adapter is trainable, something
            is random and not in the adapter, or the base is not quantized.
    """
    peft_model = find_peft_model(model)
    _check_adapter(peft_model)
    adapter = {id(parameter) for parameter in adapter_parameters(peft_model).values()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapter]
    if trainable:
        raise ValueError(
            f"`{trainable[0]}` is trainable and {len(trainable) - 1} more outside the adapter; a client may only "
            "train LoRA factors and `modules_to_save`."
        )
    check_new_parameters(peft_model)
    if allow_full_precision:
        return
    linears = full_precision_linears(peft_model)
    if linears is None:
        base = peft_model.get_base_model()
        name = getattr(base.config, "_name_or_path", "") or type(base).__name__
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


def _check_adapter(model: PeftModel) -> None:
    names, active = list(model.peft_config), list(model.active_adapters)
    if active != [ADAPTER]:
        raise ValueError(
            f"The PeftModel has the adapters {names}, of which {active} are active; expected one of the name 'default'. "
            "Leave out `adapter_name` where the adapter is made or loaded."
        )
    config = model.peft_config[ADAPTER]
    check_adapter_config(config)
    if any(".modules_to_save." in key for key in adapter_parameters(model)):
        raise ValueError(
            f"bias={config.bias!r} and modules_to_save={sorted(config.modules_to_save)}: PEFT would save their biases twice, "
            "under names that no model has. Set bias='lora_only', or 'none'."
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    without = [name for name, layer in layers.items() if getattr(layer.get_base_layer(), "bias", None) is None]
    if config.lora_bias and without:
        raise ValueError(
            f"lora_bias=True, but `{without[0]}` has no bias that the adapter's could be merged into. Leave out lora_bias, "
            "or the target."
        )


def check_new_parameters(model: PeftModel) -> None:
    """Refuse parameters that the checkpoint does not have and the adapter does not train: random, and different everywhere.

    Raises:
        ValueError: naming them, with the line to write.
    """
    base = model.get_base_model()
    trained = {id(parameter) for parameter in adapter_parameters(model).values()}
    named = {name: parameter for name, parameter in base.named_parameters() if not _is_of_adapter(name)}
    copies = dict(base.named_parameters())
    lost = []
    for name in list_new_parameters(base):
        copy = copies.get(name.replace(".original_module.", f".modules_to_save.{ADAPTER}."))
        if name in named and (copy is None or id(copy) not in trained):
            lost.append(_original_name(name))
    if lost:
        first = ", ".join(f"`{name}`" for name in lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        raise ValueError(
            f"The checkpoint does not have {first} of {type(base).__name__}, so these start at random, and the adapter does "
            "not train them in full: they would stay random, and LoRA on them can't be merged. Set modules_to_save="
            f"{_shorten(lost, [_original_name(name) for name in named])} in the LoraConfig (task_type='SEQ_CLS' and "
            "'TOKEN_CLS' do it for `classifier` and `score`), or load a class that the checkpoint is complete for."
        )


def _shorten(names: list[str], all_names: list[str]) -> list[str]:
    """The last names of the largest modules that have no other parameters than `names`."""
    found = set()
    for name in names:
        place = name
        while "." in place:
            parent = place.rpartition(".")[0]
            if not all(other in names for other in all_names if other.startswith(f"{parent}.")):
                break
            place = parent
        found.add((place if place != name else name.rpartition(".")[0]).rpartition(".")[2] or name)
    return sorted(found)


def _original_name(name: str) -> str:
    return name.replace(".base_layer", "").replace(".original_module", "")


def _is_of_adapter(name: str) -> bool:
    """Whether a parameter is one that PEFT added."""
    return any(part.startswith("lora_") or part in ("modules_to_save", "token_adapter") for part in name.split("."))


def check_loss_weights(trainer: Any) -> None:
    """Refuse a loss with weights that are trained beside the adapter: they would go from client to client, and be lost.

    Raises:
        ValueError: naming one of them.
    """
    adapter = {id(parameter) for parameter in trainer.model.parameters()}
    losses = getattr(trainer, "loss", None)
    for loss in losses.values() if isinstance(losses, dict) else [losses]:
        for name, parameter in loss.named_parameters() if isinstance(loss, torch.nn.Module) else ():
            if parameter.requires_grad and id(parameter) not in adapter:
                raise ValueError(
                    f"{type(loss).__name__} has weights (`{name}`) that are trained beside the adapter, and a client may only "
                    "train the adapter. Use a loss without weights, or freeze them."
                )


def full_precision_linears(model: Any) -> list[str] | None:
    """Names of the base's linear layers that hold full-precision weights; None if the base has no quantized layer."""
    base = model.get_base_model()
    if not any(is_quantized(module) for module in base.modules()):
        return None
    manifest = find_manifest(model)
    if manifest is not None:  # it knows what `export_base` reduced of the layers that bitsandbytes leaves alone
        return manifest["full_precision_linears"]
    trained = ("lora_", "modules_to_save", "original_module")
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not is_quantized(module)
        and not any(part in name for part in trained)
    ]


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether a module is a quantized linear layer."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # heavy, and not needed to import the package

    return isinstance(module, Linear4bit | Linear8bitLt)


def find_manifest(model: Any) -> dict[str, Any] | None:
    """The manifest of the base that the model was loaded from, if its directory has one."""
    directory = getattr(model.get_base_model().config, "_name_or_path", "")
    return read_manifest(directory) if directory and (Path(directory) / BASE_MANIFEST).is_file() else None
