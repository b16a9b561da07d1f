# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Block quantization of tensors: every value becomes the nearest level of its block's scale. Pure tensor functions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .codebooks import check_bits, codebook
from .packing import CACHED, pack_codes, unpack_codes


_CELLS = 1024  # per unit, for `_make_finder`


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A tensor as packed codes and one scale per block.

    `codes` `(bytes,)` uint8, see [`pack_codes`]; `scales` `(blocks,)` float32 or float16, the largest magnitude of each
    block of `block_size` values in memory order (the last block may be short); `shape` of the original.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, ...]
    bits: int
    block_size: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def round_to_levels(
    tensor: torch.Tensor,
    levels: torch.Tensor,
    block_size: int,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "tensor",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest level of every value, relative to the largest magnitude of its block.

    The arithmetic is bit-identical to bitsandbytes' 4-bit kernels: with the NF4 levels the indices are theirs.

    Args:
        tensor: Of any shape; blocks are of values in memory order.
        levels: `(k,)`, sorted, k ≤ 256.
        block_size: Values of a block; the last one may be shorter.
        scale_dtype: Of the scales.
        name: Of the tensor, in errors.

    Returns:
        Indices `(numel,)` uint8, and scales `(blocks,)`.

    Raises:
        ValueError: if a value is NaN or infinite or overflows `scale_dtype`, or `block_size` is not positive.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size}; expected a positive number of values.")
    flat = tensor.detach().reshape(-1)
    find_nearest = _make_finder(tuple(levels.tolist()), flat.device)
    indices = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    scales = torch.empty(-(-flat.numel() // block_size), dtype=scale_dtype, device=flat.device)
    for start, stop in _slices(flat, block_size):
        part, length = flat[start:stop].float(), min(block_size, stop - start)
        blocks = part.view(-1, length)
        part_scales = scales[start // block_size : start // block_size + len(blocks)]
        part_scales.copy_(blocks.abs().amax(dim=1))
        if not math.isfinite(part_scales.max()):
            raise ValueError(
                f"`{name}` has values that are NaN, infinite or beyond {scale_dtype}; a quantized tensor must be finite. "
                "Look for a diverged training run or a damaged checkpoint."
            )
        # An all-zero block, as LoRA's B at the start, must come back as zeros: 0 * (1 / 1e-38) is 0, 0 * (1 / 0) is NaN.
        divisors = part_scales.float().clamp(min=1e-38)[:, None]
        # bitsandbytes multiplies whole blocks by the reciprocal, and divides a short last one.
        scaled = blocks * divisors.reciprocal_() if length == block_size else blocks / divisors
        find_nearest(scaled.view(-1), indices[start:stop])
    return indices, scales


def find_between_levels(
    tensor: torch.Tensor, levels: torch.Tensor, block_size: int, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the values that lie nearly halfway between two levels: rounding them either way costs the same.

    Args:
        tensor: What [`round_to_levels`] would round.
        levels: `(k,)` sorted.
        block_size: Values that share a scale.
        tolerance: Largest distance from halfway, as a share of the two levels' distance.

    Returns:
        Positions `(n,)` int64 in memory order, rising, and the index of the lower of the two levels `(n,)` uint8.
    """
    flat = tensor.detach().reshape(-1)
    bounds = (levels[:-1] + levels[1:]) / 2
    widths = (levels[1:] - levels[:-1]) * tolerance
    positions, lower = [], []
    for start, stop in _slices(flat, block_size):
        part, length = flat[start:stop].float(), min(block_size, stop - start)
        blocks = part.view(-1, length)
        scaled = (blocks / blocks.abs().amax(dim=1).clamp(min=1e-38)[:, None]).view(-1)
        above = torch.bucketize(scaled, bounds)
        for nearest in (above - 1, above):  # the bound below, and the one above
            index = nearest.clamp(0, len(bounds) - 1)
            hit = ((scaled - bounds[index]).abs() <= widths[index]) & (nearest == index)
            places = hit.nonzero().view(-1)
            positions.append(places + start)
            lower.append(index[places].to(torch.uint8))
    if not positions:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)
    found, order = torch.cat(positions).sort(stable=True)
    return found, torch.cat(lower)[order]


def _slices(flat: torch.Tensor, block_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole blocks that cover `flat`, and the short last block as another range."""
    whole = flat.numel() - flat.numel() % block_size
    step = max(CACHED // block_size, 1) * block_size if flat.device.type == "cpu" else max(whole, 1)
    for start in range(0, whole, step):
        yield start, min(start + step, whole)
    if whole < flat.numel():
        yield whole, flat.numel()


@lru_cache
def _make_finder(levels: tuple[float, ...], device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """A function that writes, for values `(n,)` in [-1, 1], the index of the nearest of the sorted `levels` into `(n,)`
    uint8: what `torch.bucketize` finds by the bounds halfway between them, twenty times as fast.

    [-1, 1] is cut into cells with at most one bound each. A value's cell tells all bounds but the one in the same cell,
    as rounding is monotone, and with that one it is compared.
    """

    def find_cells(values: torch.Tensor) -> torch.Tensor:
        return (values + 1).mul_(_CELLS).int()

    sorted_levels = torch.tensor(levels, dtype=torch.float32, device=device)
    bounds = (sorted_levels[:-1] + sorted_levels[1:]) / 2
    cells = find_cells(bounds)
    if (cells.diff() == 0).any():
        return lambda values, out: out.copy_(torch.bucketize(values, bounds))
    below = torch.bucketize(torch.arange(2 * _CELLS + 2, device=device), cells).to(torch.uint8)
    own_bound = torch.full((2 * _CELLS + 2,), math.inf, dtype=torch.float32, device=device)
    own_bound[cells.long()] = bounds

    def find_nearest(values: torch.Tensor, out: torch.Tensor) -> None:
        index = find_cells(values)
        torch.index_select(below, 0, index, out=out)
        # A negative difference has its sign bit set; torch's comparisons take five times as long.
        out -= own_bound.index_select(0, index).sub_(values).view(torch.int32).__irshift__(31)

    return find_nearest


def restore_from_levels(
    indices: torch.Tensor,
    scales: torch.Tensor,
    levels: torch.Tensor,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The inverse of [`round_to_levels`]: each level times its block's scale in float32, `(numel,)`.

    Args:
        indices: `(numel,)`, of levels.
        scales: `(blocks,)`.
        levels: `(k,)`.
        block_size: Values of a block.
        dtype: Of the result.
    """
    levels, scales = levels.to(indices.device), scales.float()
    values = torch.empty(indices.shape, dtype=dtype, device=indices.device)
    for start, stop in _slices(indices, block_size):
        first, length = start // block_size, min(block_size, stop - start)
        part = levels.index_select(0, indices[start:stop].int())
        part.view(-1, length).mul_(scales[first : first + (stop - start) // length, None])
        values[start:stop] = part
    return values


def quantize(
    tensor: torch.Tensor,
    bits: int | str,
    block_size: int = 256,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "tensor",
) -> QuantizedTensor:
    """Quantize in blocks.

    Args:
        tensor: Of any shape.
        bits: Per value; one that has a codebook.
        block_size: Values of a block.
        scale_dtype: Of the scales.
        name: Of the tensor, in errors.

    Raises:
        ValueError: for bits without a codebook, or values that are not finite.
    """
    bits = check_bits(bits)
    indices, scales = round_to_levels(tensor, codebook(bits), block_size, scale_dtype, name)
    return QuantizedTensor(pack_codes(indices, bits), scales, tuple(tensor.shape), bits, block_size)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values that `quantized` stands for, in its shape.

    Raises:
        ValueError: if the packed codes or the scales do not fit the shape.
    """
    count = math.prod(quantized.shape)
    if quantized.scales.numel() != -(-count // quantized.block_size):
        raise ValueError(
            f"{quantized.scales.numel()} scales for {count} values in blocks of {quantized.block_size}; "
            f"expected {-(-count // quantized.block_size)}. The data are truncated or belong to another tensor."
        )
    indices = unpack_codes(quantized.codes, quantized.bits, count)
    levels = codebook(quantized.bits)
    # Other bits have a level for each code that unpacking can give.
    if quantized.bits == 8 and indices.numel() and int(indices.max()) >= len(levels):
        raise ValueError(f"A code of {int(indices.max())} in {quantized.bits}-bit data: they are damaged.")
    return restore_from_levels(indices, quantized.scales, levels, quantized.block_size, dtype).view(quantized.shape)


def quantize_tensors(
    tensors: Mapping[str, torch.Tensor],
    bits: int,
    block_size: int = 256,
    scale_dtype: torch.dtype = torch.float32,
    names: Sequence[str] | None = None,
) -> dict[str, QuantizedTensor]:
    """[`quantize`] the tensors of an adapter.

    Args:
        tensors: By key.
        bits: Per value.
        block_size: Values of a block.
        scale_dtype: Of the scales.
        names: Keys of those to quantize; all by default.
    """
    return {name: quantize(tensors[name], bits, block_size, scale_dtype, name) for name in names or tensors}
