# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The rules of aggregation by name: what each trains, and what it does not go together with."""

from collections.abc import Iterable

from peft import PeftConfig


RULES = ("fedavg", "freeze_a", "alternate", "exact", "stack")
ROBUST_RULES = ("none", "norm_clipping", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median")
_PRODUCT_RULES = ("exact", "stack")


def trainable_factors(rule: str, round_number: int) -> tuple[str, ...]:
    """The LoRA factors that clients train in a round, counted from 1.

    `freeze_a` trains B alone (FFA-LoRA, arXiv 2403.12313). `alternate` trains B in odd rounds and A in even ones (RoLoRA,
    arXiv 2502.01755): B first, since A has no gradient while B is 0.
    """
    if rule == "freeze_a" or (rule == "alternate" and round_number % 2 == 1):
        return ("lora_B",)
    return ("lora_A",) if rule == "alternate" else ("lora_A", "lora_B")


def trainable_keys(rule: str, round_number: int, keys: Iterable[str]) -> list[str]:
    """Those of an adapter's `keys` that clients train, and send, in a round: also everything that is no LoRA factor."""
    trained = trainable_factors(rule, round_number)
    frozen = [name for name in ("lora_A", "lora_B") if name not in trained]
    frozen += [name.replace("lora_", "lora_embedding_") for name in frozen]
    return [key for key in keys if not any(f".{name}" in key for name in frozen)]


def check_rule(
    rule: str,
    *,
    robust: str = "none",
    num_attackers: int = 0,
    clients_per_round: int | None = None,
    min_clients: int | None = None,
    weighting: str = "examples",
    server_optimizer: str = "sgd",
    server_learning_rate: float = 1.0,
    server_momentum: float = 0.0,
    broadcast: str = "every_round",
    num_rounds: int = 1,
    fit_server_step: bool = False,
    control_variate: float = 0.0,
    keyed_rounding: bool = False,
    secure_aggregation: bool = False,
    peft_config: PeftConfig | None = None,
) -> None:
    """Refuse options of aggregation that do not go together.

    Raises:
        ValueError: saying why.
    """
    if rule not in RULES:
        raise ValueError(f"aggregation={rule!r}; expected one of {', '.join(RULES)}.")
    if robust not in ROBUST_RULES:
        raise ValueError(f"robust={robust!r}; expected one of {', '.join(ROBUST_RULES)}.")
    product, alone = rule in _PRODUCT_RULES, broadcast != "every_round"
    plain_step = (server_optimizer, server_learning_rate, server_momentum) == ("sgd", 1.0, 0.0)
    conflicts = [
        (
            product and not plain_step,
            "a server optimizer other than sgd with learning rate 1 and no momentum: it would change B and A apart from "
            "each other, and their product would no longer be the mean. Leave the server's optimizer at its default",
        ),
        (
            product and fit_server_step,
            "fit_server_step: a multiple of the factors' steps is no multiple of their product's. Set it to False",
        ),
        (
            product and control_variate,
            f"control_variate={control_variate}: it is an estimate for the mean of the factors, not of their product. Use "
            "'fedavg', 'freeze_a' or 'alternate'",
        ),
        (
            rule == "stack" and (broadcast != "never" or num_rounds != 1),
            "anything but broadcast='never' with num_rounds=1: whoever receives the stack sees every client's own factors, "
            "and it grows with each round. For more rounds use aggregation='exact'",
        ),
        (
            rule == "exact" and alone,
            f"broadcast={broadcast!r}: rounds at one proxy are averaged by their Δ, factor by factor, which is not exact. "
            "Use broadcast='every_round'",
        ),
        (
            rule == "alternate" and alone,
            f"broadcast={broadcast!r}: rounds at one proxy are averaged, but these train different factors; and where B "
            "starts at 0, A alone learns nothing. Use broadcast='every_round'",
        ),
        (
            keyed_rounding and rule in ("freeze_a", "alternate"),
            "keyed_rounding: it is exact as long as all clients have the same of the factor that they do not train, and each "
            "would have its own. Use 'fedavg' or 'exact'",
        ),
        (
            product and secure_aggregation,
            "secure aggregation: the mean of B·A is not to be had from sums of masked factors. Use 'freeze_a' or "
            "'alternate', whose sums are exact",
        ),
        (
            product and robust in ("norm_clipping", "median", "trimmed_mean"),
            f"robust={robust!r}, which changes B and A apart from each other, so that their product is nobody's. Use "
            "'krum', 'multi_krum' or 'geometric_median', which weigh whole clients",
        ),
        (
            product and peft_config is not None and _is_no_product(peft_config),
            "DoRA or `target_parameters`: there ΔW is not s·B·A. Use 'fedavg' or 'freeze_a'",
        ),
        (
            robust != "none" and secure_aggregation,
            f"robust={robust!r} and secure aggregation at once: the server sees nothing but the sum and can't judge "
            "updates. Clip them at the clients instead",
        ),
        (
            robust != "none" and weighting != "uniform",
            f"robust={robust!r} and weighting={weighting!r} at once: the number of examples is what a client says, and an "
            "attacker would say many. Set weighting='uniform'",
        ),
    ]
    for conflict, reason in conflicts:
        if conflict:
            raise ValueError(f"aggregation={rule!r} does not go with {reason}.")
    _check_attackers(robust, num_attackers, clients_per_round, min_clients)


def _is_no_product(peft_config: PeftConfig) -> bool:
    return bool(getattr(peft_config, "use_dora", False) or getattr(peft_config, "target_parameters", None))


def _check_attackers(robust: str, num_attackers: int, clients_per_round: int | None, min_clients: int | None) -> None:
    counted = robust in ("trimmed_mean", "krum", "multi_krum")
    if num_attackers < 0 or (counted and num_attackers == 0):
        raise ValueError(
            f"robust={robust!r} with num_attackers={num_attackers}; expected how many attackers a round may have."
        )
    needed = 2 * num_attackers + (1 if robust == "trimmed_mean" else 3)
    # A round that loses clients must be told apart from one that can't be aggregated.
    for option, clients in (("clients_per_round", clients_per_round), ("min_clients", min_clients)):
        if counted and clients is not None and clients < needed:
            raise ValueError(
                f"robust={robust!r} against {num_attackers} attackers needs {needed} clients in each round; "
                f"{option}={clients}. Raise {option}, or lower num_attackers."
            )
