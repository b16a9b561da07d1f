# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The rules of aggregation by name: what each trains, and what it does not go together with.

A new rule is a line in `RULES` and a file `aggregation/<module>.py` with its function `aggregate`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, slots=True)
class Rule:
    """What an aggregation rule is.

    Args:
        module: File in `aggregation/` with its function.
        trains: LoRA factors that clients train and send.
        averages_products: Whether it averages B·A, so that nothing may change B and A apart from each other.
    """

    module: str
    trains: tuple[str, ...] = ("lora_A", "lora_B")
    averages_products: bool = False


@dataclass(frozen=True, slots=True)
class RobustRule:
    """What a robust rule is.

    Args:
        per_coordinate: Whether it treats each value by itself, and so changes B and A apart from each other.
        clients_needed: Updates that it needs against f attackers; None if it takes no number of attackers.
    """

    per_coordinate: bool
    clients_needed: Callable[[int], int] | None = None


RULES = {
    "fedavg": Rule("fedavg"),
    "freeze_a": Rule("fedavg", trains=("lora_B",)),  # FFA-LoRA, arXiv 2403.12313
    "exact": Rule("exact", averages_products=True),
}
ROBUST_RULES = {
    "none": None,
    "median": RobustRule(per_coordinate=True),
    "trimmed_mean": RobustRule(per_coordinate=True, clients_needed=lambda attackers: 2 * attackers + 1),
    "multi_krum": RobustRule(per_coordinate=False, clients_needed=lambda attackers: 2 * attackers + 3),
}
SERVER_OPTIMIZERS = ("sgd", "yogi")


def trainable_keys(rule: str, keys: Iterable[str]) -> list[str]:
    """Those of an adapter's `keys` that clients train and send: all but the LoRA factors that the rule freezes."""
    frozen = [name for name in ("lora_A", "lora_B") if name not in RULES[rule].trains]
    frozen += [name.replace("lora_", "lora_embedding_") for name in frozen]
    return [key for key in keys if not any(f".{name}" in key for name in frozen)]


def check_rules(options: Any) -> None:
    """Refuse options of aggregation that do not go together.

    Args:
        options: A [`FederatedConfig`], or anything with its fields.

    Raises:
        ValueError: naming both options, and saying why and what to do.
    """
    rule, robust = RULES[options.aggregation], ROBUST_RULES[options.robust]
    aggregation, chosen = f"aggregation={options.aggregation!r}", f"robust={options.robust!r}"
    if options.server_momentum and options.server_optimizer != "sgd":
        raise ValueError(
            f"server_momentum={options.server_momentum} does not go with server_optimizer={options.server_optimizer!r}, "
            "which has a first moment already. Leave server_momentum out."
        )
    if rule.averages_products:
        for name, neutral in (("server_optimizer", "sgd"), ("server_learning_rate", 1.0), ("server_momentum", 0.0)):
            if getattr(options, name) != neutral:
                raise ValueError(
                    f"{aggregation} does not go with {name}={getattr(options, name)!r}: it would change B and A "
                    f"separately, and their product would no longer be the mean. Set {name}={neutral!r}."
                )
        if robust is not None and robust.per_coordinate:
            raise ValueError(
                f"{aggregation} does not go with {chosen}, which changes B and A separately: their product is then "
                "nobody's update. Use robust='multi_krum', which weighs whole clients."
            )
    if robust is None:
        return
    if options.weighting != "uniform":
        raise ValueError(
            f"{chosen} does not go with weighting={options.weighting!r}: an attacker would claim many examples. Set "
            "weighting='uniform'."
        )
    _check_attackers(options, robust)


def check_products(rule: str, peft_config: "PeftConfig") -> None:
    """Refuse a rule that averages products for adapters whose update is not s·B·A.

    Raises:
        ValueError: naming the rule and the adapter's option.
    """
    for name in ("use_dora", "target_parameters", "lora_bias"):
        if RULES[rule].averages_products and getattr(peft_config, name, None):
            raise ValueError(
                f"aggregation={rule!r} does not go with an adapter of {name}={getattr(peft_config, name)!r}: its update is "
                "not s·B·A. Use aggregation='fedavg' or 'freeze_a'."
            )


def _check_attackers(options: Any, robust: RobustRule) -> None:
    number = options.num_attackers
    if number < 0 or (robust.clients_needed and not number):
        raise ValueError(
            f"robust={options.robust!r} with num_attackers={number}; expected the number of attackers in a round, "
            f"{1 if robust.clients_needed else 0} or more. Set num_attackers."
        )
    if robust.clients_needed is None:
        return
    needed = robust.clients_needed(number)
    # A round that loses clients must be told apart from one that can't be aggregated.
    for name in ("clients_per_round", "min_clients"):
        clients = getattr(options, name) or (options.num_clients if name == "clients_per_round" else None)
        if clients is not None and clients < needed:
            raise ValueError(
                f"robust={options.robust!r} against num_attackers={number} needs {needed} clients in each round; "
                f"{name}={clients}. Raise {name}, or lower num_attackers."
            )
