# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Rounding a weight for its layer's output: what one column's rounding does wrong, later columns make up for."""

import torch
from torch.nn.functional import pad

from ..tensors.quantization import round_to_levels


DAMPING = 0.01  # of the mean moment, as in GPTQ's own code
_COLUMNS = 128  # updated at once
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of a block's largest magnitude, tried as its scale


def round_with_compensation(
    weight: torch.Tensor, moments: torch.Tensor, levels: torch.Tensor, block_size: int, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like [`round_to_levels`], but with a small error of the layer's output instead of the weight's.

    GPTQ (arXiv 2210.17323, algorithm 1): column by column, the error of rounding is moved to the columns that are not
    rounded yet, by the inverse of the inputs' second moments; columns with large inputs come first. Before, each block gets
    the scale with the least error, the moments' diagonal being the weight of a column. A block's largest value becomes ±1
    times the scale, and no other outgrows it; so rounding the result once more, as bitsandbytes does, changes nothing.

    Args:
        weight: `(out, in)`.
        moments: Σ x xᵀ of the layer's inputs x, `(in, in)`.
        levels: `(k,)` sorted, from -1 to 1.
        block_size: Values that share a scale, in memory order.
        name: Of the weight, in errors.

    Returns:
        Indices `(numel,)` uint8, and scales `(blocks,)` float32, which the weight's dtype can hold.

    Raises:
        ValueError: if a value is not finite, or the moments do not fit the weight.
    """
    rows, columns = weight.shape
    if moments.shape != (columns, columns) or not bool(moments.isfinite().all()):
        raise ValueError(
            f"`{name}` has {columns} inputs; expected finite moments of the shape ({columns}, {columns}), got "
            f"{tuple(moments.shape)}. Do the calibration rows belong to this model, and is its output finite on them?"
        )
    nearest, largest = round_to_levels(weight, levels, block_size, name=name)
    if not moments.diagonal().any():
        return nearest, largest
    bounds = (levels[:-1] + levels[1:]) / 2
    scales = _fit_scales(weight, moments.diagonal(), levels, block_size, largest)
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = _factorize(moments.double()[order][:, order]).float()
    zero, top = int(levels.abs().argmin()), len(levels) - 1

    values = weight.float()
    reached = (values.abs() == _spread(largest, values.shape, block_size))[:, order]
    ends = torch.where(values > 0, top, 0)[:, order].int()
    left, steps = values[:, order], _spread(scales, values.shape, block_size)[:, order]
    found = torch.empty((rows, columns), dtype=torch.int32)
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        part, errors = left[:, start:stop].clone(), torch.empty((rows, stop - start))
        for place, column in enumerate(range(start, stop)):
            value, step = part[:, place], steps[:, column]
            index = torch.bucketize(value / step, bounds, out_int32=True)
            index = torch.where(reached[:, column], ends[:, column], index).masked_fill(step == 0, zero)
            found[:, column] = index
            errors[:, place] = (value - levels[index] * step) / factor[column, column]
            part[:, place + 1 :] -= errors[:, place, None] * factor[column, column + 1 : stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    codes[:, order] = found.to(torch.uint8)
    return codes.view(-1), scales


def _fit_scales(
    weight: torch.Tensor, importance: torch.Tensor, levels: torch.Tensor, block_size: int, largest: torch.Tensor
) -> torch.Tensor:
    """The scale of each block, a share of its largest magnitude, with the least error weighted by `importance` `(in,)`."""
    blocks = pad(weight.float().reshape(-1), (0, -weight.numel() % block_size)).view(-1, block_size)
    weights = pad(importance.float().expand(weight.shape).reshape(-1), (0, -weight.numel() % block_size)).view_as(
        blocks
    )
    bounds = (levels[:-1] + levels[1:]) / 2
    least, scales = torch.full_like(largest, torch.inf), largest.clone()
    for share in _SHARES:
        tried = (largest * share).to(weight.dtype).float()  # packed in this dtype
        steps = tried.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        errors = levels[torch.bucketize(blocks / steps, bounds, out_int32=True)].mul_(steps).sub_(blocks)
        error = errors.square_().mul_(weights).sum(1)
        better = error < least
        least[better], scales[better] = error[better], tried[better]
    return scales


def _spread(scales: torch.Tensor, shape: torch.Size, block_size: int) -> torch.Tensor:
    """The scale of each value of a tensor of `shape`."""
    return scales.repeat_interleave(block_size)[: shape.numel()].view(shape)


def _factorize(moments: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped `moments`, `(in, in)`."""
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True)
