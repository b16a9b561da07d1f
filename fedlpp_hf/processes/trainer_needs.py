# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a kind of trainer needs of its model, by the classes that it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer


@dataclass(frozen=True, slots=True)
class TrainerNeeds:
    """What a trainer needs of its model.

    Args:
        task: Task type of PEFT that the model must be for, whatever its checkpoint holds.
        head: The one for a checkpoint without a head.
        init_kwargs: For `from_pretrained`.
    """

    task: str | None = None
    head: str | None = None
    init_kwargs: Mapping[str, Any] = field(default_factory=dict)


_BY_NAME = {
    "RewardTrainer": TrainerNeeds("SEQ_CLS", init_kwargs={"num_labels": 1}),
    "Seq2SeqTrainer": TrainerNeeds(head="SEQ_2_SEQ_LM"),
}
_OF_TRL = TrainerNeeds(head="CAUSAL_LM")


def find_needs(trainer_class: type) -> TrainerNeeds:
    """What trainers of this class need. TRL's are told by name, since TRL need not be installed."""
    libraries = {"trl", "transformers"}
    parents = [c for c in trainer_class.__mro__ if c.__module__.partition(".")[0] in libraries]
    for parent in parents:
        if parent.__name__ in _BY_NAME:
            return _BY_NAME[parent.__name__]
    return _OF_TRL if any(parent.__module__.startswith("trl.") for parent in parents) else TrainerNeeds()


def takes_loss_from_model(trainer_class: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the loss is the one that the model's forward returns: nothing else computes it."""
    return trainer_class.compute_loss is Trainer.compute_loss and arguments.get("compute_loss_func") is None
