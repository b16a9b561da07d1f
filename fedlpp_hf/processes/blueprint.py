# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a process beside this one needs to build a trainer like this one's: the owner's, and those that train clients."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedModel

from ..base.contents import check_configurations
from ..base.heads import initialize_new_parameters_
from ..base.load import load_base
from ..base.manifest import read_manifest
from ..base.model_class import choose_model_class, is_headless
from ..client.checks import ADAPTER, find_transformer
from ..config.federated import FederatedConfig
from ..config.options import options_beside, reference_options
from ..tensors.codebooks import FULL_PRECISION
from .sentence_models import is_sentence_trainer, load_sentence_model
from .trainer_needs import find_needs, takes_loss_from_model


_REFUSED = {
    "quantization_config": "the owner quantizes the base, once for all clients: set base_bits",
    "trust_remote_code": "code from the Hub is not run: pass `model_class`",
    "device_map": "the trainer places the model: set use_cpu, or CUDA_VISIBLE_DEVICES",
}


@dataclass(slots=True)
class TrainerBlueprint:
    """The arguments of a [`FederatedMixin`] trainer, picklable.

    Args:
        full_model: The owner's full model, and empty in what clients' processes get.
        args: The federation's options.
        trainer_class: The trainer's own class, so that an overridden `compute_loss` counts.
        model_class: Overrides the class that the full model and the base are loaded as.
        peft_config: Of the adapter.
        base_dir: The directory of the base.
        owner_dataset: The owner's rows.
        selection_dataset: Rows that the owner chooses by.
        client_datasets: The clients' rows by id. The owner's process gets them for the full-precision reference alone.
        trainer_arguments: Those of the trainer's `__init__` that are not named here.
        model_init_kwargs: For `from_pretrained` of the full model and the base, such as `num_labels`.
    """

    full_model: str
    args: FederatedConfig
    trainer_class: type
    model_class: Any
    peft_config: PeftConfig
    base_dir: str = ""
    owner_dataset: Any = None
    selection_dataset: Any = None
    client_datasets: Any = None
    trainer_arguments: dict[str, Any] = field(default_factory=dict)
    model_init_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def build(self, datasets: Mapping[str, Any], output_dir: Path, base_dir: str = "", reference: bool = False) -> Any:
        """A trainer of `datasets` by client, which has no owner, no audit, no trackers and no progress bar.

        Args:
            datasets: Rows by client.
            output_dir: Its directory.
            base_dir: The base that it trains on; empty, it trains on the full model.
            reference: Run the federation in full precision, with plain updates and a plain mean.
        """
        args = copy.copy(self.args)
        PartialState(cpu=args.use_cpu)  # the arguments were made in another process, where they have set it
        values = {"output_dir": str(output_dir)} | options_beside(type(args))
        if reference:
            values |= reference_options(type(args))
        if not base_dir:
            values["base_bits"] = FULL_PRECISION
        for name, value in values.items():
            setattr(args, name, value)
        args.fit_to(len(datasets))
        return self.trainer_class(
            model=base_dir or self.load_full_model(args),
            args=args,
            train_dataset=dict(datasets),
            peft_config=copy.deepcopy(self.peft_config),
            model_class=self.model_class,
            model_init_kwargs=self.model_init_kwargs,
            **self.trainer_arguments,
        )

    def check(self, loads_model: bool) -> None:
        """Refuse arguments that can't hold for both the clients' model and the owner's.

        Args:
            loads_model: Whether the trainer loads its model from a path.

        Raises:
            ValueError: naming the argument.
        """
        for name, instead in _REFUSED.items():
            if self.model_init_kwargs.get(name):
                raise ValueError(f"model_init_kwargs has {name}={self.model_init_kwargs[name]!r}; {instead}.")
        losses = self.trainer_arguments.get("loss")
        for loss in losses.values() if isinstance(losses, dict) else [losses]:
            if (loads_model or self.full_model) and isinstance(loss, torch.nn.Module) and list(loss.parameters()):
                raise ValueError(
                    f"`loss` is a {type(loss).__name__} with a model in it, but each process loads its own. Pass the class, "
                    f"loss={type(loss).__name__}, or functools.partial of it, which is called with that model."
                )

    def follow(self, model: PeftModel) -> None:
        """Take adapter, class and labels from the model that clients train on, where it was not loaded from a path."""
        self.peft_config = model.peft_config[ADAPTER]
        base = model.get_base_model()
        if not self.base_dir and self.model_class is None and isinstance(base, PreTrainedModel):
            self.model_class = type(base)
            labels = {"num_labels": base.config.num_labels, "problem_type": base.config.problem_type}
            self.model_init_kwargs = {**labels, **self.model_init_kwargs}

    def choose_class(self, config: Any) -> Any:
        """The class of the checkpoint with this configuration: the same for the full model and the base.

        Raises:
            ValueError: if nothing says which head it gets, and the loss is the model's own.
        """
        if self.model_class is not None:
            return self.model_class
        needs, task = find_needs(self.trainer_class), self.peft_config.task_type
        chosen = choose_model_class(config, getattr(task, "value", task) or needs.task, needs.head)
        if is_headless(chosen.__name__) and takes_loss_from_model(self.trainer_class, self.trainer_arguments):
            raise ValueError(
                f"The checkpoint is a {chosen.__name__}, which has no head and computes no loss. Say which head to train: "
                "peft_config with a task_type (SEQ_CLS, TOKEN_CLS, …), or `model_class`, such as "
                "AutoModelForImageClassification with modules_to_save=['classifier']; and model_init_kwargs="
                "{'num_labels': …}."
            )
        return chosen

    def load_full_model(self, args: FederatedConfig) -> torch.nn.Module:
        """The owner's model in full precision; in float32 on the CPU, where 16-bit products are many times slower."""
        options = {"dtype": torch.float32 if args.device.type == "cpu" else "auto"} | self.init_kwargs
        config, _ = AutoConfig.from_pretrained(self.full_model, return_unused_kwargs=True, **options)
        with self._explaining_sizes():
            if is_sentence_trainer(self.trainer_class):
                model = load_sentence_model(self.trainer_class, self.full_model, **options)
            else:
                model = self.choose_class(config).from_pretrained(self.full_model, **options)
        initialize_new_parameters_(model.get_submodule(find_transformer(model)), args.seed, torch.float32)
        return model

    def load_base(self) -> torch.nn.Module:
        """The base, as the same class and with the same start of what it does not have."""
        options = {name: value for name, value in self.init_kwargs.items() if name != "revision"}
        check_configurations(Path(self.base_dir), read_manifest(self.base_dir))
        config, _ = AutoConfig.from_pretrained(self.base_dir, return_unused_kwargs=True, **options)
        modules = self.peft_config.modules_to_save or ()
        with self._explaining_sizes():
            model = load_base(self.base_dir, self.choose_class(config), new_modules=modules, **options)
        initialize_new_parameters_(model, self.args.seed, torch.float32)
        if is_sentence_trainer(self.trainer_class):
            return load_sentence_model(self.trainer_class, self.base_dir, model, **options)
        return model

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """`model_init_kwargs`, with what the trainer needs of its model."""
        return {**find_needs(self.trainer_class).init_kwargs, **self.model_init_kwargs}

    @contextmanager
    def _explaining_sizes(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"The checkpoint has a head of another size than model_init_kwargs={self.init_kwargs} asks for. Leave "
                "num_labels out to train its head, or add 'ignore_mismatched_sizes': True for a new one."
            ) from error
