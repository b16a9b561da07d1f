# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a report says of client-level differential privacy."""

from collections.abc import Mapping, Sequence
from typing import Any

from .metrics import Record


def find_spent(records: Sequence[Record]) -> Mapping[str, Any] | None:
    """`privacy` of the last round with noise: what all rounds have spent. None where there was no noise."""
    return next((record["privacy"] for record in reversed(records) if "privacy" in record), None)


def format_spent(privacy: Mapping[str, Any]) -> str:
    """ε in a few digits, rounded up."""
    digits = 2 if privacy["epsilon"] < 100 else 0
    step = 10.0**-digits
    return f"{-(-privacy['epsilon'] // step) * step:.{digits}f}"


def describe_privacy(records: Sequence[Record], config: Any) -> list[str]:
    """Sentences on what was spent, by which analysis, against whom it holds, and whether the budget ended the run.

    Args:
        records: Of all rounds, from round 0.
        config: The federation's options, or a mapping of them.
    """
    spent = find_spent(records)
    if spent is None:
        return []
    holds = "not against the server, which has every update"
    if "colluders" in spent:  # clients add the noise
        holds = f"against the server, too, while at most {spent['colluders']} of a round's clients help it"
    read = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    lines = [
        f"Client-level differential privacy: ε = {format_spent(spent)} at δ = {spent['delta']:g} after {spent['releases']} "
        f"releases ({spent['analysis']}; noise multiplier {spent['noise_multiplier']:.4g}, clip {spent['clip_norm']:.4g}). It "
        f"holds for whoever sees the model and the proxies, {holds}. What other federations with the same clients spend comes on "
        "top."
    ]
    done, target = records[-1]["round"], read("target_epsilon")
    if target is not None and done < read("num_rounds") and spent["epsilon_of_another_round"] > target:
        lines.append(
            f"The budget of ε = {target:g} ended the federation after round {done}: another round would have brought it to "
            f"{spent['epsilon_of_another_round']:.3f}."
        )
    lost = spent["releases"] - sum("privacy" in record for record in records)
    if lost:
        lines.append(
            f"{lost} of these releases belong to rounds that were lost after their noise was drawn; they count."
        )
    return lines
