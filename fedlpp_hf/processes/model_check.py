# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Whether a checkpoint and an adapter go together, told from the checkpoint's headers before anything is written."""

from typing import Any

from peft import PeftConfig

from ..base.full_model import FullModel
from ..base.modules import build_meta_model
from ..base.tensor_plan import plan_tensors
from ..client.adapter_config import make_peft_model
from ..client.checks import check_new_parameters


def check_adapter_fits(source: FullModel, config: Any, model_class: Any, peft_config: PeftConfig) -> None:
    """Refuse an adapter that leaves something random which the checkpoint does not have.

    Args:
        source: The full model.
        config: Its configuration.
        model_class: The class that it is loaded as.
        peft_config: Of the adapter.

    Raises:
        ValueError: naming the parameters, with the line to write; or for modules that do not exist.
    """
    model = build_meta_model(config, model_class)
    missing = set(plan_tensors(model, source.shapes).missing)
    for name, parameter in model.named_parameters():
        if name not in missing:
            parameter._is_hf_initialized = True  # as `from_pretrained` marks what it has found
    try:
        peft_model = make_peft_model(model, peft_config, low_cpu_mem_usage=True)
    except NotImplementedError:
        return  # an adapter that needs the weights; it is checked when they are loaded
    check_new_parameters(peft_model)
