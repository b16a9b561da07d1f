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
from ..tensors.quantization import FULL_PRECISION


@dataclass(slots=True)
class TrainerBlueprint:
    """The arguments of a [`FederatedMixin`] trainer, picklable; `trainer_class` makes an overridden `compute_loss` count.

    `full_model` is the owner's, and empty in what clients' processes get; `base_dir` holds the base. `owner_dataset` has
    the owner's rows. `client_datasets` are the clients' own: the owner's process gets them for the full-precision
    reference alone (`compare_full_precision`). `trainer_arguments` are those of `__init__` that are not named here.
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

    def build(self, datasets: Mapping[str, Any], output_dir: Path, base_dir: str = "", **options: Any) -> Any:
        """A trainer of `datasets` by client on the base, or on the full model where `base_dir` is empty.

        It has no owner, no audit, no trackers and no progress bar. `options` replace some of its configuration.
        """
        args = copy.copy(self.args)
        args.output_dir = str(output_dir)
        args.full_model = None
        args.report_to, args.push_to_hub, args.merge, args.disable_tqdm = [], False, False, True
        args.compare_full_precision, args.fit_server_step, args.overwrite = False, False, True
        args.audit, args.control_variate, args.client_workers, args.round_timeout = False, 0.0, 1, None
        if not base_dir:
            args.base_bits = FULL_PRECISION
        # The owner is one client; the federation may want more than one in a round.
        if args.clients_per_round is not None:
            args.clients_per_round = min(args.clients_per_round, max(len(datasets), 1))
        args.min_clients = min(args.min_clients, max(len(datasets), 1))
        for name, value in options.items():
            setattr(args, name, value)
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
