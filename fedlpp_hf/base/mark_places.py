# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which weights carry a mark: those that can be rounded either way, and matter least to the model."""

import math

import torch

from ..tensors.quantization import find_between_levels


_TOLERANCE = 0.005  # of the distance of two levels: one per cent of the weights can be rounded either way
_MARKS = 1 << 14  # of a whole model: enough for the attacks in docs/base.md; more would move the model's loss more
_ORDINARY = 0.2  # of a weight's columns


def find_mark_places(
    weight: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, block_size: int, model_weights: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the weights that can be rounded either way, and choose those that are marked.

    A model's loss depends most on the few inputs that are large for any text (massive activations, arXiv 2402.17762). Columns that
    read them have an unusual norm. So columns whose norm is near the median come first, and of these, weights whose
    two levels are closest.

    Args:
        weight: `(out, in)`.
        levels: `(k,)` sorted.
        scales: Of its blocks, `(blocks,)`.
        block_size: Weights that share a scale.
        model_weights: How many weights the model has in 4-bit codes; `weight` gets its share of the marks.

    Returns:
        Positions of the weights that can be rounded either way, `(n,)` int64 in memory order, the index of the lower level
        `(n,)` uint8, and which of them are marked, `(n,)` bool.
    """
    places, lower = find_between_levels(weight, levels, block_size, _TOLERANCE)
    widths = (levels[lower.long() + 1] - levels[lower.long()]) * scales[places // block_size]
    columns = weight.shape[1]
    ranks = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32).argsort(stable=True).argsort()
    unusual = (ranks[places % columns] - (columns - 1) / 2).abs() > _ORDINARY / 2 * columns
    order = widths.argsort(stable=True)
    order = order[unusual[order].to(torch.uint8).argsort(stable=True)]
    marked = torch.zeros(len(places), dtype=torch.bool)
    marked[order[: math.ceil(_MARKS * weight.numel() / model_weights)]] = True
    return places, lower, marked
