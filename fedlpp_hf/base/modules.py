# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The modules of a model, without its weights: which of them a base quantizes, and which stay floats."""

from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer


def build_meta_model(config: Any, model_class: Any = None) -> PreTrainedModel:
    """Build the model's modules without memory for their weights.

    Raises:
        ValueError: if transformers does not have the class that the configuration names.
    """
    if model_class is None:
        names = config.architectures or []
        model_class = getattr(transformers, names[0], None) if names else None
        if model_class is None:
            raise ValueError(
                f"The configuration names {names or 'no architecture'}, which transformers "
                f"{transformers.__version__} does not have; pass `model_class` (code from the Hub is not run)."
            )
    build = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        return build(config)


def default_skip_modules(model: PreTrainedModel) -> list[str]:
    """List the modules that stay floats, to be trained: the output embeddings and the task heads.

    Task heads are the children of the model outside its backbone (`classifier`, `score`, `qa_outputs`, …).
    """
    output = model.get_output_embeddings()
    skip = {name for name, module in model.named_modules() if module is output}
    if model.base_model is not model:
        skip |= {
            name for name, child in model.named_children() if child is not model.base_model and list_linears(child)
        }
    return sorted(skip)


def list_linears(model: nn.Module) -> set[str]:
    """The names of all `nn.Linear` and `Conv1D` modules."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def make_quantization_config(bits: int, double_quant: bool, skip: list[str], dtype: torch.dtype) -> BitsAndBytesConfig:
    """The configuration with which transformers loads a base.

    Args:
        bits: 8, or 1 to 4, all of which run on 4-bit kernels.
        double_quant: Whether the scales are quantized, too.
        skip: Modules that stay floats.
        dtype: Of the full model; products are computed in it.
    """
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=torch.uint8,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def find_quantized(model: PreTrainedModel, config: Any) -> dict[str, bool]:
    """Find the modules that become bitsandbytes weights, and whether each was a `Conv1D`.

    transformers itself is asked, because it matches `config.quantization_config`'s skip list by suffix and regular
    expression too.

    Raises:
        ValueError: if transformers builds other modules for a quantized model of this class.
    """
    quantized = build_meta_model(config, type(model))
    quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    quantizer.preprocess_model(quantized, device_map=None)
    rebuilt = sorted(quantized.state_dict().keys() ^ model.state_dict().keys())
    if rebuilt:
        raise ValueError(
            f"transformers rebuilds {type(model).__name__} for bitsandbytes (`{rebuilt[0]}` and {len(rebuilt) - 1} more "
            "parameters differ); a base of it can't be exported."
        )
    return {
        name: issubclass(module.source_cls, Conv1D)
        for name, module in quantized.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }


def count_weights(model: PreTrainedModel, quantized: dict[str, bool]) -> int:
    """How many weights the quantized modules have together."""
    return sum(model.get_submodule(name).weight.numel() for name in quantized)


def find_bulk(model: PreTrainedModel, quantized: dict[str, bool], skip: list[str]) -> set[str]:
    """Find the parameters like those of the quantized modules that transformers keeps as floats.

    These are fused experts, and Linears that it wants in float32 (T5's `wo`).
    """
    kept = list_linears(model) - set(quantized) - _find_skipped(model, skip)
    return {f"{name}.weight" for name in kept} | {name for name in model.state_dict() if ".experts." in name}


def check_skip_list(model: PreTrainedModel, quantized: dict[str, bool], skip: list[str]) -> None:
    """Refuse a skip list by which transformers would leave other modules as they are, too.

    Raises:
        ValueError: naming the first of these modules.
    """
    in_fp32 = set(model._keep_in_fp32_modules or ())  # transformers adds these to every skip list
    kept = list_linears(model) - set(quantized) - _find_skipped(model, skip)
    stray = sorted(name for name in kept if in_fp32.isdisjoint(name.split(".")))
    if stray:
        raise ValueError(
            f"transformers would not quantize `{stray[0]}` and {len(stray) - 1} more: their names end like one of {skip}. "
            "Pass `skip_modules` with names that nothing else ends with."
        )


def _find_skipped(model: PreTrainedModel, skip: list[str]) -> set[str]:
    return {name for name in list_linears(model) for module in skip if f"{name}.".startswith(f"{module}.")}


def check_missing(model: PreTrainedModel, missing: list[str], skip: list[str]) -> None:
    """Refuse weights that are missing inside the model's backbone, and not below a module of `skip`.

    Raises:
        ValueError: naming the first of them.
    """
    backbone = next((f"{name}." for name, child in model.named_children() if child is model.base_model), "")
    allowed = tuple(f"{name}." for name in skip)
    lost = [name for name in missing if name.startswith(backbone) and not name.startswith(allowed)]
    if lost:
        raise ValueError(
            f"`{lost[0]}` of {type(model).__name__} is missing, and {len(lost) - 1} more. Are the weights complete, and "
            f"of this `model_class`? Export the base with model_class={type(model).__name__} (--model_class) if the full model "
            "has it; at export, name the module in `skip_modules` if clients are to initialize it."
        )
