# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Does an adapter look like a step of training, or like one that was made so that the update tells rows?

With h = W·x + s·B·A·x the gradients are ∂A = s·Bᵀδ·xᵀ and ∂B = s·δ·(A·x)ᵀ, summed over tokens. Whoever chooses A and B chooses
what is summed: with A = 0 and one row of B, ∂A is a weighted sum of the inputs themselves; with one-hot rows of A, ∂B holds
single coordinates of x; with B far larger than any training makes it, LoRA's part outweighs W, and single tokens can be made
to dominate. An honest first round (random A, B = 0) tells something, too, so these checks bound nothing: clipping, noise and
few rounds do. They make a server that wants more than an honest one leave traces, or stay within what training could do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from ..config.rules import RULES, trainable_keys
from ..tensors.adapters import check_tensors
from ..tensors.quantization import QuantizedTensor, dequantize, quantize
from ..wire.encoding import restore_tensors
from ..wire.messages import ClientTask


Tensors = Mapping[str, torch.Tensor]

_DEPENDENT = 1e-2  # smallest singular value of A over its largest; honest runs on small models had 0.5 and more
_RANK_ONE = 2e-2  # second singular value of B over its first; 0.38 in the run of one row and one step
_NARROW = 50  # a row of A has at least 1/50 of its length as effective entries; uniform entries have 5/9
_MARGIN = 3  # of the rounding error, which outliers raise above that of Gaussian values


@dataclass(frozen=True, slots=True)
class EarlierRound:
    """What a client keeps of its last round to compare the next adapter with.

    Args:
        round: Its number.
        proxy: The adapter that it started from.
        steps: Norm of the client's own change of each tensor, before clipping.
        rank_one: B factors whose own change had rank one.
    """

    round: int
    proxy: Tensors
    steps: Mapping[str, float] = field(default_factory=dict)
    rank_one: frozenset[str] = frozenset()


def check_proxy(task: ClientTask, initial: Tensors, earlier: EarlierRound | None, max_change: float) -> None:
    """Refuse a task whose adapter no training of this federation could have made.

    Args:
        task: With a proxy.
        initial: The client's own untouched adapter.
        earlier: The client's last round of the same federation.
        max_change: Norm of a tensor's change, as a multiple of the client's own in its last round.

    Raises:
        ValueError: naming the tensor and what is wrong with it.
    """
    assert task.proxy is not None
    proxy = restore_tensors(task.proxy)
    check_tensors(proxy, initial, "task's adapter")
    _check_zeros(task.round, proxy, initial, earlier)
    exact = RULES[task.options.rule].averages_products  # which makes new factors of the mean product
    known = frozenset() if earlier is None else earlier.rank_one
    for key, tensor in proxy.items():
        if ".lora_A." in key:
            outputs = proxy[key.replace(".lora_A.", ".lora_B.")].flatten(1)
            _check_inputs(key, tensor.flatten(1).double(), min(*tensor.flatten(1).shape, len(outputs)), exact)
        elif key.endswith(".lora_B.weight") and tensor.any() and key not in known and is_rank_one(tensor):
            raise ValueError(f"`{key}` has rank one, which isolates a single direction of the gradient")
    for key, value in task.proxy.items():
        error = _rounding_error(value.bits, value.block_size) if isinstance(value, QuantizedTensor) else 0.0
        _check_change(key, proxy, initial, earlier, (task.round, task.options.rule, error, max_change))


def is_rank_one(tensor: torch.Tensor) -> bool:
    """Whether a matrix is an outer product of two vectors, or nearly so."""
    values = torch.linalg.svdvals(tensor.flatten(1).double())
    return len(values) > 1 and bool(values[1] < _RANK_ONE * values[0])


def _check_zeros(number: int, proxy: Tensors, initial: Tensors, earlier: EarlierRound | None) -> None:
    before = initial if earlier is None else earlier.proxy
    for key, tensor in proxy.items():
        trained = earlier is not None and earlier.steps.get(key, 0.0) > 0
        if not tensor.any() and (before[key].any() or trained):
            raise ValueError(f"`{key}` is all zero, but was trained or started otherwise")
        if number == 1 and tensor.any() and not before[key].any():
            raise ValueError(f"`{key}` is not zero in round 1, but an untouched adapter's is")
    outputs = [key for key in proxy if ".lora_B." in key]
    if number > 1 and outputs and not any(proxy[key].any() for key in outputs):
        raise ValueError(f"B is zero everywhere in round {number}: this adapter was never trained")


def _check_inputs(key: str, matrix: torch.Tensor, side: int, exact: bool) -> None:
    """A, `(r, in)`: independent rows, each of them spread over the inputs."""
    values = torch.linalg.svdvals(matrix)
    if values[side - 1] < _DEPENDENT * values[0]:
        raise ValueError(f"`{key}` has rows that depend on each other")
    squares = matrix.square()
    entries = squares.sum(1).square() / squares.square().sum(1).clamp(min=1e-300)
    if not exact and matrix.shape[1] >= 8 and entries.min() < max(2.0, matrix.shape[1] / _NARROW):
        raise ValueError(
            f"`{key}` has a row that reads {entries.min():.1f} of its {matrix.shape[1]} inputs, as if to single them out"
        )


def _check_change(
    key: str,
    proxy: Tensors,
    initial: Tensors,
    earlier: EarlierRound | None,
    facts: tuple[int, str, float, float],
) -> None:
    number, rule, error, max_change = facts
    exact = RULES[rule].averages_products
    before = initial if earlier is None else earlier.proxy
    reference = float(before[key].norm())
    change = float((proxy[key] - before[key]).norm())
    step = 0.0 if earlier is None else earlier.steps.get(key, 0.0) * max(number - earlier.round, 1)
    frozen = earlier is not None and key not in trainable_keys(rule, proxy)
    if (step or frozen) and not exact:
        # The server's step is a mean of changes like this client's; both ends are rounded.
        allowed = (1 + _MARGIN * error) * max_change * step + (2 * _MARGIN * error + 1e-6) * reference
    else:
        # Of a B that was zero, nothing is known but that training seldom makes it longer than A.
        partner = key.replace("lora_B.bias", "lora_B.weight").replace("lora_B", "lora_A")
        partner = partner.replace("lora_embedding_A", "lora_embedding_B")
        allowed = max_change * max(reference, step, float(initial[partner].norm())) or math.inf
    if not change <= allowed:
        raise ValueError(f"`{key}` has moved by {change:.3g}; at most {allowed:.3g} is expected")


@cache
def _rounding_error(bits: int, block_size: int) -> float:
    """The relative error of Gaussian values."""
    values = torch.randn(16 * 256, generator=torch.Generator().manual_seed(0))
    return float((dequantize(quantize(values, bits, block_size)) - values).norm() / values.norm())
