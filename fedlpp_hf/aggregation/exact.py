# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The exact mean of the products B·A (`exact`), split into the adapter's rank and a residual that the server keeps."""

import math
from collections.abc import Sequence

import torch

from ..tensors.lora import lora_factors
from .mean import sum_updates
from .products import mean_of_products, stack_products, truncate_product
from .round import AggregationResult, RoundUpdates


RESIDUAL_RANK = 64  # columns for each target that the residual may have


def aggregate(updates: RoundUpdates, shares: Sequence[float]) -> AggregationResult:
    """`scale` times the mean of B_i·A_i with `shares` p_i, as FedEx-LoRA (arXiv 2410.09432) has it, without sending the correction.

    Tensors outside LoRA are averaged as they are.
    """
    adapter, shares = updates.adapter, [updates.scale * share for share in shares]
    others = set(adapter)
    delta: dict[str, torch.Tensor] = {}
    residual: dict[str, torch.Tensor] = {}
    squares = {"product": 0.0, "residual": 0.0, "dropped": 0.0}
    for target in lora_factors(adapter, updates.peft_config).values():
        others -= {target.key_a, target.key_b}
        step = mean_of_products(target, updates.deltas, shares, updates.start, updates.offset)
        held = [tensors for tensors in (adapter, updates.residual) if target.key_a in tensors]
        products = [(t[target.key_b].double().flatten(1), t[target.key_a].double().flatten(1)) for t in held]
        factors, rest, norms = truncate_product(target, stack_products([*products, *step]), adapter, RESIDUAL_RANK)
        delta |= {key: factor - adapter[key] for key, factor in factors.items()}
        residual |= rest
        for name, norm in norms.items():
            squares[name] += (target.scale * norm) ** 2
    if others:
        mean = sum_updates(updates.deltas, shares, sorted(others))
        total = math.fsum(shares)
        delta |= {key: value - total * updates.offset[key] if updates.offset else value for key, value in mean.items()}
    report = {f"{name}_norm": math.sqrt(square) for name, square in squares.items()}
    return AggregationResult(delta, residual, report)
