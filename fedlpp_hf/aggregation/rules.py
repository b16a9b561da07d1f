# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""From clients' updates to the server's mean update: the mean itself, and one entry for every rule."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from peft import PeftConfig

from ..config.rules import trainable_keys
from ..tensors.adapters import check_keys, lora_factors
from ..tensors.files import Read, find_values
from .products import mean_of_products, stack_products, truncate_product
from .robust import (
    coordinate_median,
    geometric_median_weights,
    gram_matrix,
    krum_weights,
    norm_clipping_scales,
    trimmed_mean,
)


# Updates that are read side by side: the sum in double precision goes through memory once for all of them.
_GROUP = 32
# Values that are summed at a time: with 20 bytes for each, all arithmetic is in the processor's second cache.
_CHUNK = 2**15

Update = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class AggregationResult:
    """What a round's updates come to.

    `delta` is for the server's optimizer; tensors that this round did not train are absent. `residual` holds, under the
    adapter's keys, the factors of what the adapter's rank can't hold (`exact`, `stack`): the server keeps it, hands it to
    the next round's [`aggregate`] and merges it ([`join_residual`]), and never sends it. `report` is for the round's record.
    """

    delta: dict[str, torch.Tensor]
    residual: dict[str, torch.Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


def normalize_weights(weights: Sequence[float]) -> list[float]:
    """`weights` divided by their sum.

    Raises:
        ValueError: if one is negative or not finite, or if their sum is not positive.
    """
    for place, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"Weight {weight} of client {place}; expected a finite number, at least 0.")
    largest = max(weights, default=0.0)
    if not largest > 0:
        raise ValueError(f"The weights of {len(weights)} updates sum to 0; at least one update must count.")
    shares = [weight / largest for weight in weights]  # the sum of huge weights could overflow
    total = math.fsum(shares)
    return [share / total for share in shares]


def average_updates(updates: Iterable[Update], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """The weighted mean of `updates`, tensor by tensor, float32: Δ̄ = Σ p_i Δ_i (FedAvg, arXiv 1602.05629).

    With updates that are [`TensorFile`]s memory is flat in their number: the sum in double precision, and 32 updates' views
    of one tensor. Give them in a fixed order of clients: sums are rounded, and the order of
    arrival must not show in the result.

    Raises:
        ValueError: if updates differ in keys or shapes, or the weights fit neither their number nor [`normalize_weights`].
    """
    return sum_updates(updates, normalize_weights(weights))


def sum_updates(
    updates: Iterable[Update], factors: Sequence[float], keys: Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    """Σ f_i Δ_i, tensor by tensor, float32, of all tensors or of those named by `keys`; the rest is as in [`average_updates`].

    Raises:
        ValueError: if updates differ in keys or shapes, or are not as many as `factors`.
    """
    iterator, done = iter(updates), 0
    shapes: dict[str, torch.Size] = {}
    sums: dict[str, torch.Tensor] = {}  # flat
    memory = memoryview(bytearray(8 * _CHUNK))
    buffers = torch.empty(2, _CHUNK, dtype=torch.float64)  # once: new memory costs a fault for every page
    while group := list(islice(iterator, _GROUP)):
        names = list(keys or shapes or group[0])
        for place, update in enumerate(group, done):
            if keys is None:
                check_keys(update, names, f"update of client {place}")
        group_factors = factors[done : done + len(group)]
        first, done = done, done + len(group)
        if done > len(factors):
            break
        for key in names:
            terms = []
            for place, (factor, update) in enumerate(zip(group_factors, group, strict=True), first):
                shape, read = find_values(update, key, memory)
                _check_shape(key, shape, shapes.setdefault(key, shape), place)
                terms.append((factor, read))
            # The last group's sum is the result; the others' takes the place of the one before it, since new tensors for
            # each group leave the heap in pieces that the next ones don't fit, 150 MB of them each time.
            total, last = sums.get(key), done == len(factors)
            if last or total is None:
                result = torch.empty(shapes[key].numel(), dtype=torch.float32 if last else torch.float64)
            else:
                result = total
            _add_weighted_(result, total, terms, buffers)
            sums[key] = result
    if done != len(factors):
        raise ValueError(f"{len(factors)} weights, but {'more' if done > len(factors) else done} updates.")
    return {key: sums[key].view(shape) for key, shape in shapes.items()}


@torch.no_grad()
def _add_weighted_(
    result: torch.Tensor, total: torch.Tensor | None, terms: Sequence[tuple[float, Read]], buffers: torch.Tensor
) -> None:
    """Set `result` `(n,)` to `total`, which it may be itself, or 0, + Σ f_i·tensor_i in double precision, rounded once."""
    for start in range(0, len(result), _CHUNK):
        end = min(start + _CHUNK, len(result))
        piece, values = buffers[:, : end - start]
        piece.zero_() if total is None else piece.copy_(total[start:end])
        for factor, read in terms:
            # To add float32 to float64 at once would make a new tensor each time, and take twice as long.
            piece.add_(values.copy_(read(start, end)), alpha=factor)
        result[start:end] = piece


def _check_shape(key: str, shape: torch.Size, expected: torch.Size, place: int) -> None:
    if shape != expected:
        raise ValueError(
            f"`{key}` of client {place} has shape {tuple(shape)}; expected {tuple(expected)}. Bring updates of another "
            "rank to the server's shapes with `pad_update`."
        )


def aggregate(
    rule: str,
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    adapter: Update,
    proxy: Update | Sequence[Update],
    peft_config: PeftConfig,
    round_number: int = 1,
    residual: Update | None = None,
    residual_rank: int = 64,
    robust: str = "none",
    num_attackers: int = 0,
    mixed_ranks: bool = False,
) -> AggregationResult:
    """One round's aggregation by any rule, in the order of `updates`, which must not depend on who arrived first.

    `updates` are Δ_i = θ_i − proxy in the server's shapes ([`pad_update`] for clients of lower rank), with the keys of
    [`trainable_keys`]; they may be [`TensorFile`]s. `adapter` is the server's, `proxy` what the clients started from
    (each its own, where they differ: clients of lower rank, brought to the server's shapes by [`pad_update`], too),
    `residual` that of the round before, of which `residual_rank` columns per target are kept; `mixed_ranks` makes
    `exact` order the factors for clients of lower rank. [`check_rule`] says which
    options go together.

    Raises:
        ValueError: if there are no updates, they differ from the adapter, or are too few for the robust rule.
    """
    if not updates:
        raise ValueError("There are no updates to aggregate; a round needs at least one.")
    keys = trainable_keys(rule, round_number, adapter)
    for place, update in enumerate(updates):
        check_keys(update, keys, f"update of client {place}")
    if robust in ("median", "trimmed_mean"):
        mean = coordinate_median(updates) if robust == "median" else trimmed_mean(updates, num_attackers)
        return AggregationResult(mean)
    shares = normalize_weights(weights)
    report = {}
    if robust != "none":
        shares = _judge(updates, shares, robust, num_attackers)
        report["client_weights"] = shares
    if rule in ("fedavg", "freeze_a", "alternate"):
        return AggregationResult(sum_updates(updates, shares), {}, report)
    proxies = [proxy] * len(updates) if isinstance(proxy, Mapping) else proxy
    return _aggregate_products(
        rule, updates, shares, report, adapter, proxies, peft_config, residual or {}, residual_rank, mixed_ranks
    )


def _judge(updates: Sequence[Update], shares: list[float], robust: str, num_attackers: int) -> list[float]:
    """Each update's part in the mean by a robust rule; only norm clipping leaves a sum below 1."""
    gram = gram_matrix(updates)
    if robust == "geometric_median":
        return geometric_median_weights(gram, shares)
    if robust == "norm_clipping":
        return [share * scale for share, scale in zip(shares, norm_clipping_scales(gram), strict=True)]
    selected = 1 if robust == "krum" else len(updates) - num_attackers
    return normalize_weights(krum_weights(gram, num_attackers, selected))


def _aggregate_products(
    rule: str,
    updates: Sequence[Update],
    shares: list[float],
    report: dict[str, Any],
    adapter: Update,
    proxies: Sequence[Update],
    peft_config: PeftConfig,
    residual: Update,
    residual_rank: int,
    mixed_ranks: bool,
) -> AggregationResult:
    others = set(adapter)
    delta: dict[str, torch.Tensor] = {}
    left_over: dict[str, torch.Tensor] = {}
    squares = {"product": 0.0, "residual": 0.0, "dropped": 0.0}
    for target in lora_factors(adapter, peft_config).values():
        others -= {target.key_a, target.key_b}
        step = mean_of_products(target, updates, shares, proxies)
        if rule == "stack":
            left, right = stack_products(step)
            left_over |= {target.key_a: right.float(), target.key_b: left.float()}
            continue
        held = [tensors for tensors in (adapter, residual) if target.key_a in tensors]
        products = [(t[target.key_b].double().flatten(1), t[target.key_a].double().flatten(1)) for t in held]
        factors, rest, norms = truncate_product(
            target, stack_products([*products, *step]), adapter, residual_rank, mixed_ranks
        )
        delta |= {key: factor - adapter[key] for key, factor in factors.items()}
        left_over |= rest
        for name, norm in norms.items():
            squares[name] += (target.scale * norm) ** 2
    if others:
        delta |= sum_updates(updates, shares, sorted(others))
    if rule == "exact":
        report |= {f"{name}_norm": math.sqrt(square) for name, square in squares.items()}
    return AggregationResult(delta, left_over, report)
