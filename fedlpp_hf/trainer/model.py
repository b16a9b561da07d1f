# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""From what a user passes as `model` to what clients train on: a base with an adapter."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import set_seed

from ..base.load import load_base
from ..base.manifest import BASE_MANIFEST
from ..processes.blueprint import TrainerBlueprint, load_full_model
from ..processes.owner import OwnerProcess
from ..server.store import FEDERATION_DIR, RoundStore
from ..tensors.codebooks import FULL_PRECISION


def resolve_model(
    model: str | Path | torch.nn.Module, blueprint: TrainerBlueprint
) -> tuple[torch.nn.Module, OwnerProcess | None]:
    """The model that clients train on, and the owner's process if it was needed to make it.

    `blueprint` learns where the base and the full model are.

    Args:
        model: A model, the directory of a base, or the path or Hub id of the full model, which only the owner's process
            may open.
        blueprint: Of the trainer.

    Raises:
        ValueError: if `model` and `full_model` name different full models.
    """
    args = blueprint.args
    if not isinstance(model, str | Path):
        return model, None
    if (Path(model) / BASE_MANIFEST).is_file():
        blueprint.base_dir = str(model)
        return load_base(model, blueprint.model_class), None
    if args.full_model not in (None, "", str(model)):
        raise ValueError(
            f"model='{model}' is no quantized base (it has no {BASE_MANIFEST}), and full_model='{args.full_model}' "
            "names another full model. Give one of them."
        )
    args.full_model = blueprint.full_model = str(model)
    if args.base_bits == FULL_PRECISION:
        return load_full_model(args.full_model, blueprint.model_class, args), None
    base_dir = Path(args.output_dir) / FEDERATION_DIR / "base"
    blueprint.base_dir = str(base_dir)
    owner = None
    if args.process_index == 0:
        owner = OwnerProcess(blueprint)
        # Only a federation that can be resumed keeps its base; another one may want other bits.
        if args.overwrite or not (RoundStore(args.output_dir).exists and (base_dir / BASE_MANIFEST).is_file()):
            owner.export_base(base_dir)
    PartialState().wait_for_everyone()
    return load_base(base_dir, blueprint.model_class), owner


def add_adapter(model: torch.nn.Module, peft_config: PeftConfig | None, seed: int) -> Any:
    """The model with a new adapter at a start that is a function of `seed`; a PeftModel as it is.

    Raises:
        ValueError: if there is neither an adapter nor its configuration.
    """
    if isinstance(model, PeftModel):
        return model
    if peft_config is None:
        raise ValueError("`peft_config` is missing: say which adapter to train, e.g. LoraConfig(r=8).")
    set_seed(seed)  # every client's untouched adapter must start at the same A
    return get_peft_model(model, copy.deepcopy(peft_config))  # PEFT writes the base's path into it
