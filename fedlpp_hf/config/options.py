# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What else is known of an option beside its value and its help, and checks that all groups use.

It stands in its group, as `FACTS`, and not in the field's metadata: `HfArgumentParser` hands those to argparse.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class OptionFacts:
    """Facts about the options of one group, by name.

    Args:
        card: Labels of options in model cards and in `fedlpp-hf inspect`.
        free: Options that a resumed federation may change, because no result depends on them.
        beside: Values in the trainers of other processes: the owner's, the workers', a client's over a network.
        reference: Values in the full-precision reference of the report.
    """

    card: Mapping[str, str] = field(default_factory=dict)
    free: Sequence[str] = ()
    beside: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, Any] = field(default_factory=dict)


# The same for options of TrainingArguments.
_TRAINING = OptionFacts(
    card={
        "num_train_epochs": "local epochs",
        "max_steps": "local steps (-1: whole epochs)",
        "learning_rate": "local learning rate",
        "seed": "seed",
    },
    free=(
        "output_dir", "resume_from_checkpoint", "report_to", "disable_tqdm", "run_name", "hub_token", "hub_model_id",
        "push_to_hub", "hub_private_repo", "log_level", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
        "save_total_limit",
    ),
    beside={"report_to": [], "push_to_hub": False, "disable_tqdm": True, "load_best_model_at_end": False},
)  # fmt: skip


def free_options(config_class: type) -> set[str]:
    """Options that a resumed federation may change."""
    return {name for facts in _collect(config_class) for name in facts.free}


def options_beside(config_class: type) -> dict[str, Any]:
    """Values of the options that a trainer in another process must not inherit: no owner, no audit, no trackers."""
    return {name: value for facts in _collect(config_class) for name, value in facts.beside.items()}


def reference_options(config_class: type) -> dict[str, Any]:
    """Values of the options that make a federation one in full precision, with plain updates and a plain mean."""
    return {name: value for facts in _collect(config_class) for name, value in facts.reference.items()}


def card_labels(config_class: type) -> dict[str, str]:
    """Labels of the options that cards and inspection show, by name."""
    return {name: label for facts in _collect(config_class) for name, label in facts.card.items()}


def _collect(config_class: type) -> Iterator[OptionFacts]:
    yield from (facts for group in config_class.__mro__ if (facts := vars(group).get("FACTS")))
    yield _TRAINING


def check_positive(config: Any, *names: str, optional: bool = False) -> None:
    """Refuse options that are not above zero; with `optional`, None passes.

    Raises:
        ValueError: naming the option and its value.
    """
    for name in names:
        value = getattr(config, name)
        if not (value is None and optional) and not value > 0:
            raise ValueError(f"{name}={value}; expected a positive number.")


def check_choice(config: Any, name: str, choices: Sequence[str]) -> None:
    """Refuse an option that is not one of `choices`.

    Raises:
        ValueError: naming the option, its value and the choices.
    """
    if getattr(config, name) not in choices:
        raise ValueError(f"{name}={getattr(config, name)!r}; expected one of {', '.join(choices)}.")
