# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a process beside this one needs to build a trainer like this one's: the owner's, and those that train clients."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from ..config.federated import FederatedConfig
from ..config.options import options_beside, reference_options
from ..tensors.codebooks import FULL_PRECISION


@dataclass(slots=True)
class TrainerBlueprint:
    """The arguments of a [`FederatedMixin`] trainer, picklable.

    Args:
        full_model: The owner's full model, and empty in what clients' processes get.
        args: The federation's options.
        trainer_class: The trainer's own class, so that an overridden `compute_loss` counts.
        model_class: The class that the full model and the base are loaded as.
        peft_config: Of the adapter.
        base_dir: The directory of the base.
        owner_dataset: The owner's rows.
        client_datasets: The clients' rows by id. The owner's process gets them for the full-precision reference alone.
        trainer_arguments: Those of the trainer's `__init__` that are not named here.
    """

    full_model: str
    args: FederatedConfig
    trainer_class: type
    model_class: Any
    peft_config: PeftConfig
    base_dir: str = ""
    owner_dataset: Any = None
    client_datasets: Any = None
    trainer_arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, datasets: Mapping[str, Any], output_dir: Path, base_dir: str = "", reference: bool = False) -> Any:
        """A trainer of `datasets` by client, which has no owner, no audit, no trackers and no progress bar.

        Args:
            datasets: Rows by client.
            output_dir: Its directory.
            base_dir: The base that it trains on; empty, it trains on the full model.
            reference: Run the federation in full precision, with plain updates and a plain mean.
        """
        args = copy.copy(self.args)
        values = {"output_dir": str(output_dir)} | options_beside(type(args))
        if reference:
            values |= reference_options(type(args))
        if not base_dir:
            values["base_bits"] = FULL_PRECISION
        for name, value in values.items():
            setattr(args, name, value)
        args.fit_to(len(datasets))
        return self.trainer_class(
            model=base_dir or load_full_model(self.full_model, self.model_class, args),
            args=args,
            train_dataset=dict(datasets),
            peft_config=copy.deepcopy(self.peft_config),
            model_class=self.model_class,
            **self.trainer_arguments,
        )


def load_full_model(full_model: str, model_class: Any, args: FederatedConfig) -> torch.nn.Module:
    """The owner's model in full precision; in float32 on the CPU, where 16-bit products are many times slower."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if args.device.type == "cpu" else "auto"
    return (model_class or AutoModelForCausalLM).from_pretrained(full_model, dtype=dtype)
