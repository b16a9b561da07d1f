# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Block quantization of tensors: codebooks, rounding, bit packing. Pure tensor functions."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch


BITS = (1, 2, 3, 4, 8)
FULL_PRECISION = 32

# QLoRA (arXiv 2305.14314, appendix E): the offset that makes NormalFloat's tails finite, as in bitsandbytes.
_TAIL_QUANTILE = 0.9677083
# The eight NF4 codes with the least mean squared error on Gaussian blocks of 64 among the subsets with -1, 0 and 1.
_NF4_SUBSETS = {1: (0, 7, 15), 2: (0, 7, 11, 15), 3: (0, 1, 3, 5, 7, 10, 13, 15), 4: tuple(range(16))}
_CELLS = 1024  # per unit, for `_make_finder`
# Values whose temporaries stay in a core's cache and in memory that is there already (new memory costs as much as the
# arithmetic), and fewer than the 32768 from which torch spreads an operation over threads.
_CACHED = 30 << 10  # a multiple of 5 and 8, the codes that are packed together
_TRITS_PER_BYTE = 5  # 3**5 = 243 <= 256: 1.6 bits per ternary code


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


# bitsandbytes' table to the last bit; the formula below gives it within 2e-7.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@lru_cache
def _levels(bits: int) -> tuple[float, ...]:
    if bits in (1, 2, 4):  # NF2 is a subset of NF4, and so is {-1, 0, 1}
        return tuple(_NF4[code] for code in _NF4_SUBSETS[bits])
    if bits == 8:
        return tuple(code / 127 for code in range(-127, 128))

    return normal_float_levels(bits)


def normal_float_levels(bits: int) -> tuple[float, ...]:
    """NormalFloat's `2**bits` levels by formula: quantiles of the normal distribution, 2**(bits-1) above 0 and one less
    below, scaled to end at 1 (QLoRA, arXiv 2305.14314, appendix E)."""

    def quantiles(count: int) -> torch.Tensor:
        return torch.special.ndtri(torch.linspace(_TAIL_QUANTILE, 0.5, count, dtype=torch.float64))[:-1]

    half = 2 ** (bits - 1)
    levels = torch.cat([-quantiles(half), torch.zeros(1, dtype=torch.float64), quantiles(half + 1).flip(0)])
    return tuple((levels / levels.max()).tolist())


def codebook(bits: int | str) -> torch.Tensor:
    """The sorted levels in [-1, 1] of a `bits`-bit code, float32.

    1 (or `"ternary"`) is {-1, 0, 1}; 2, 3 and 4 are NormalFloat, the asymmetric quantile code of QLoRA (arXiv
    2305.14314, appendix E), `(2**bits,)`; 8 is absmax int8, `(255,)`.

    Raises:
        ValueError: for any other `bits`.
    """
    return torch.tensor(_levels(check_bits(bits)), dtype=torch.float32)


def nf4_subset(bits: int | str) -> tuple[int, ...]:
    """The NF4 codes that a base of `bits` (1 to 4) bits is restricted to, so that it runs on 4-bit kernels."""
    bits = check_bits(bits)
    if bits not in _NF4_SUBSETS:
        raise ValueError(f"A {bits}-bit code is no subset of NF4; expected 1, 2, 3 or 4 bits.")
    return _NF4_SUBSETS[bits]


def check_bits(bits: int | str) -> int:
    """`bits` as one of 1, 2, 3, 4, 8; `"ternary"` is 1.

    Raises:
        ValueError: if it is none of these.
    """
    number = {"ternary": 1}.get(bits, bits) if isinstance(bits, str) else bits
    if isinstance(number, str) and number.isdigit():
        number = int(number)
    if number not in BITS:
        raise ValueError(f"bits={bits!r} has no codebook; expected one of {', '.join(map(str, BITS))} or 'ternary'.")
    return int(number)


def information_bits(bits: int, block_size: int, scale_bits: int = 32) -> float:
    """Information per value in bits: the code's, plus its share of the block's scale."""
    return (math.log2(3) if bits == 1 else bits) + scale_bits / block_size


def round_to_levels(
    tensor: torch.Tensor,
    levels: torch.Tensor,
    block_size: int,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "tensor",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest level of every value of `tensor`, relative to the largest magnitude of its block.

    `levels` `(k,)` sorted, k <= 256. Returns indices `(numel,)` uint8 and scales `(blocks,)`. The arithmetic is that of
    bitsandbytes' 4-bit kernels, bit for bit, so that with the NF4 levels the indices are theirs.

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


def _slices(flat: torch.Tensor, block_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole blocks that cover `flat`, and the short last block as a range of its own."""
    whole = flat.numel() - flat.numel() % block_size
    step = max(_CACHED // block_size, 1) * block_size if flat.device.type == "cpu" else max(whole, 1)
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


def look_up(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`table[indices]` for indices `(n,)` uint8, several times as fast."""
    return _map_slices(lambda part: table.index_select(0, part.int()), indices)


def _map_slices(
    function: Callable[[torch.Tensor], torch.Tensor], flat: torch.Tensor, size: int = _CACHED
) -> torch.Tensor:
    return torch.cat([function(part) for part in flat.split(size)])


def restore_from_levels(
    indices: torch.Tensor,
    scales: torch.Tensor,
    levels: torch.Tensor,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The inverse of [`round_to_levels`]: `levels[indices]` times each block's scale in float32, then as `dtype`,
    `(numel,)`."""
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
    """Quantize to `bits` bits in blocks of `block_size` values; `name` is the one that errors mention.

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


def _pad(codes: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -codes.numel() % multiple
    return (torch.cat([codes, codes.new_zeros(missing)]) if missing else codes).view(-1, multiple)


def packed_size(bits: int, count: int) -> int:
    """Bytes of `count` packed codes."""
    if bits == 1:
        return -(-count // _TRITS_PER_BYTE)
    return -(-count // 8) * 3 if bits == 3 else -(-count * bits // 8)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack `codes` `(n,)` uint8 into bytes, the first code in the lowest bits.

    8 bits: one code per byte; 4: two; 2: four; 3: eight codes in three bytes; 1 (ternary): five codes per byte in base
    three. The last group is padded with zeros.
    """
    return codes.contiguous() if bits == 8 else _map_slices(lambda part: _pack_slice(part, bits), codes)


def _pack_slice(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 1:
        groups = _pad(codes, _TRITS_PER_BYTE)
        packed = groups[:, -1].clone()
        for place in range(_TRITS_PER_BYTE - 2, -1, -1):
            packed.mul_(3).add_(groups[:, place])
        return packed
    if bits == 3:
        c = _pad(codes, 8)
        first = c[:, 0] | c[:, 1] << 3 | c[:, 2] << 6
        second = c[:, 2] >> 2 | c[:, 3] << 1 | c[:, 4] << 4 | c[:, 5] << 7
        third = c[:, 5] >> 1 | c[:, 6] << 2 | c[:, 7] << 5
        return torch.stack([first, second, third], dim=1).reshape(-1)
    groups = _pad(codes, 8 // bits)
    packed = groups[:, 0].clone()
    for place in range(1, 8 // bits):
        packed |= groups[:, place] << bits * place
    return packed


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of [`pack_codes`]: `count` codes, uint8.

    Raises:
        ValueError: if `packed` has another size than `count` codes need.
    """
    if packed.numel() != packed_size(bits, count):
        raise ValueError(
            f"{packed.numel()} bytes of {bits}-bit codes for {count} values; expected {packed_size(bits, count)}. "
            "The data are truncated or belong to another tensor."
        )
    if bits == 8:
        return packed.clone()
    return _map_slices(lambda part: _unpack_slice(part, bits), packed, packed_size(bits, _CACHED))[:count]


def _unpack_slice(packed: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 1:
        byte = torch.arange(256, device=packed.device)
        trits = torch.stack([byte // 3**place % 3 for place in range(_TRITS_PER_BYTE)], dim=1).to(torch.uint8)
        codes = trits.index_select(0, packed.int())
    elif bits == 3:
        a, b, c = packed.view(-1, 3).unbind(1)
        codes = torch.stack(
            [
                a & 7,
                a >> 3 & 7,
                a >> 6 | (b & 1) << 2,
                b >> 1 & 7,
                b >> 4 & 7,
                b >> 7 | (c & 3) << 1,
                c >> 2 & 7,
                c >> 5,
            ],
            dim=1,
        )
    else:
        codes = torch.stack([packed >> bits * place & 2**bits - 1 for place in range(8 // bits)], dim=1)
    return codes.view(-1)


def quantize_tensors(
    tensors: Mapping[str, torch.Tensor],
    bits: int,
    block_size: int = 256,
    scale_dtype: torch.dtype = torch.float32,
    names: Sequence[str] | None = None,
) -> dict[str, QuantizedTensor]:
    """[`quantize`] every tensor of an adapter (those in `names`, if given)."""
    return {name: quantize(tensors[name], bits, block_size, scale_dtype, name) for name in names or tensors}
