# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""From what a user passes as `model` to what clients train on: a base with an adapter."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from transformers import set_seed

from ..base.heads import list_new_parameters
from ..base.manifest import BASE_MANIFEST
from ..client.adapter_config import TRAINED_HEADS, make_peft_model
from ..client.checks import ADAPTER, find_peft_model, find_transformer, is_quantized
from ..config.federated import FederatedConfig
from ..config.rules import trainable_keys
from ..processes.blueprint import TrainerBlueprint
from ..processes.owner import OwnerProcess
from ..server.store import FEDERATION_DIR, RoundStore
from ..tensors.adapters import adapter_parameters
from ..tensors.codebooks import FULL_PRECISION
from ..tensors.lora import PREFIX


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
        ValueError: if `model` and `full_model` name different full models, or another process runs a federation where the
            base would be written.
    """
    args = blueprint.args
    if not isinstance(model, str | Path):
        return model, None
    if (Path(model) / BASE_MANIFEST).is_file():
        if args.calibration_rows:
            raise ValueError(
                f"calibration_rows={args.calibration_rows}, but model='{model}' is a base already. Pass the full model, from "
                "which the owner makes one, or leave the option out."
            )
        blueprint.base_dir = str(model)
        return blueprint.load_base(), None
    if args.full_model not in (None, "", str(model)):
        raise ValueError(
            f"model='{model}' is no quantized base (it has no {BASE_MANIFEST}), and full_model='{args.full_model}' "
            "names another full model. Give one of them."
        )
    args.full_model = blueprint.full_model = str(model)
    if args.base_bits == FULL_PRECISION:
        return blueprint.load_full_model(args), None
    base_dir = Path(args.output_dir) / FEDERATION_DIR / "base"
    blueprint.base_dir = str(base_dir)
    owner = None
    if args.process_index == 0:
        store = RoundStore(args.output_dir)
        # Only a federation that can be resumed keeps its base; another one may want other bits.
        exports = args.overwrite or not (store.exists and (base_dir / BASE_MANIFEST).is_file())
        # The base of a federation that another process runs stays: whoever resumes it needs that one.
        with store.lock() if exports and store.root.exists() else nullcontext():
            owner = OwnerProcess(blueprint)
            if exports:
                owner.export_base(base_dir)
    PartialState().wait_for_everyone()
    return blueprint.load_base(), owner


def add_adapter(model: torch.nn.Module, peft_config: PeftConfig | None, seed: int) -> torch.nn.Module:
    """The model with a new adapter at a start that is a function of `seed`; one that has an adapter as it is.

    Raises:
        ValueError: if there is neither an adapter nor its configuration, or both.
    """
    if any(isinstance(module, PeftModel) for module in model.modules()):
        if peft_config is not None and peft_config not in find_peft_model(model).peft_config.values():
            raise ValueError(
                "The model is a PeftModel, which has an adapter, and `peft_config` describes another. Pass the model "
                "without an adapter, or leave out `peft_config`."
            )
        return model
    if peft_config is None:
        raise ValueError("`peft_config` is missing: say which adapter to train, e.g. LoraConfig(r=8).")
    place = find_transformer(model)
    transformer = model.get_submodule(place)
    _check_modules_to_save(transformer, peft_config)
    set_seed(seed)  # every client's untouched adapter must start at the same A
    peft_model = make_peft_model(transformer, peft_config)
    if not place:
        return peft_model
    model.set_submodule(place, peft_model)
    return model


def check_adapter_switching(model: torch.nn.Module, args: FederatedConfig) -> None:
    """Refuse a rule that freezes factors where a trainer switches adapters in each step, as DPO does for its reference.

    PEFT makes all of the adapter trainable at each switch, and what is computed again would differ.

    Raises:
        ValueError: naming both options.
    """
    keys = adapter_parameters(find_peft_model(model))
    freezes = len(trainable_keys(args.aggregation, keys)) < len(keys)
    if freezes and args.gradient_checkpointing and len(find_peft_model(model).peft_config) > 1:
        raise ValueError(
            f"aggregation={args.aggregation!r} does not go with gradient_checkpointing=True here: this trainer switches to its "
            "reference adapter in each step, which unfreezes A in between. Set gradient_checkpointing=False."
        )


def start_adapter(
    model: PeftModel, initial: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The server's adapter before the first round: LoRA's factors as clients start them, the rest as the full model has it.

    What the checkpoint does not have, and what the user trained before, starts as clients have it.

    Args:
        model: The clients' model.
        initial: The adapter as clients start it.
        own: The adapter as it starts on the full model.
    """
    config, live = model.peft_config[ADAPTER], adapter_parameters(model)
    if config.init_lora_weights is not False and any(
        value.any() for key, value in live.items() if ".lora_B." in key or ".lora_embedding_A" in key
    ):
        return dict(initial)  # an adapter that was trained before
    named = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in named.items()}
    new = {id(named[f"{PREFIX}{name}"]) for name in list_new_parameters(model.get_base_model())}
    start = dict(initial)
    for key, value in own.items():
        if any(f".{factor}" in key for factor in ("lora_A", "lora_B", "lora_embedding_")):
            continue
        original = named[names[id(live[key])].replace(f".modules_to_save.{ADAPTER}.", ".original_module.")]
        if original is live[key] or (id(original) not in new and torch.equal(original.float(), live[key].float())):
            start[key] = value
    return start


def _check_modules_to_save(model: torch.nn.Module, config: PeftConfig) -> None:
    heads = TRAINED_HEADS if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()
    names = {*(config.modules_to_save or ()), *heads}
    for place, module in model.named_modules():
        packed = [name for name, part in module.named_modules() if is_quantized(part)]
        if names and place.endswith(tuple(names)) and packed:
            raise ValueError(
                f"modules_to_save={sorted(names)}: `{'.'.join(filter(None, (place, packed[0])))}` is quantized in this base, "
                "and integers can't be trained. Name the full model instead of the base, export the base with "
                f"`{place}` in `skip_modules`, or give it LoRA (`target_modules`)."
            )
