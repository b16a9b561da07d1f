# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Rounding a weight for its layer's output: what one column's rounding does wrong, later columns make up for."""

import torch

from ..tensors.quantization import restore_from_levels, round_to_levels


DAMPING = 0.01  # of the mean moment, as in GPTQ's own code
_COLUMNS = 128  # updated at once


def round_with_compensation(
    weight: torch.Tensor, moments: torch.Tensor, levels: torch.Tensor, block_size: int, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like [`round_to_levels`], but with a small error of the layer's output instead of the weight's.

    GPTQ (arXiv 2210.17323, algorithm 1): column by column, the error of rounding is moved to the columns that are not
    rounded yet, by the inverse of the inputs' second moments; columns with large inputs come first. The scales are those of
    [`round_to_levels`]. The value that defines a block's scale stays, and no other outgrows it; so rounding the result once
    more, as bitsandbytes does, changes nothing.

    Args:
        weight: `(out, in)`.
        moments: Σ x xᵀ of the layer's inputs x, `(in, in)`.
        levels: `(k,)` sorted, from -1 to 1.
        block_size: Values that share a scale, in memory order.
        name: Of the weight, in errors.

    Returns:
        Indices `(numel,)` uint8, and scales `(blocks,)`.

    Raises:
        ValueError: if a value is not finite, or the moments do not fit the weight.
    """
    rows, columns = weight.shape
    if moments.shape != (columns, columns) or not bool(moments.isfinite().all()):
        raise ValueError(
            f"`{name}` has {columns} inputs; expected finite moments of the shape ({columns}, {columns}), got "
            f"{tuple(moments.shape)}. Do the calibration rows belong to this model, and is its output finite on them?"
        )
    nearest, scales = round_to_levels(weight, levels, block_size, name=name)
    if not moments.diagonal().any():
        return nearest, scales
    zero = int(levels.abs().argmin())
    steps = restore_from_levels(torch.zeros_like(nearest), scales, torch.ones(1), block_size).view(rows, columns)
    reached = weight.float().abs() == steps  # the values that define a scale
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = _factorize(moments.double()[order][:, order]).float()
    bounds = (levels[:-1] + levels[1:]) / 2

    left = weight.float()[:, order]
    steps, reached, fixed = steps[:, order], reached[:, order], nearest.view(rows, columns)[:, order].int()
    found = torch.empty((rows, columns), dtype=torch.int32)
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        part, errors = left[:, start:stop].clone(), torch.empty((rows, stop - start))
        for place, column in enumerate(range(start, stop)):
            value, step = part[:, place], steps[:, column]
            index = torch.bucketize(value / step, bounds, out_int32=True)
            index = torch.where(reached[:, column], fixed[:, column], index).masked_fill(step == 0, zero)
            found[:, column] = index
            errors[:, place] = (value - levels[index] * step) / factor[column, column]
            part[:, place + 1 :] -= errors[:, place, None] * factor[column, column + 1 : stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    codes[:, order] = found.to(torch.uint8)
    return codes.view(-1), scales


def _factorize(moments: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped `moments`, `(in, in)`."""
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True)
