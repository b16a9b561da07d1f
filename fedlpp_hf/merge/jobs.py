# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A merge as jobs for threads: which ranges of a shard are copied, and which are computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..base.shards import Shard
from ..tensors.headers import TensorRange
from .edits import Edit
from .locations import Piece, whole_pieces
from .plan import MergeInputs


BLOCK_BYTES = 32 << 20
# Products of fewer rows go through other kernels, which add in another order: keep chunks multiples of this.
ROW_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class Copy:
    """`length` bytes at `start` in the source that stay as they are, at `to` in the result."""

    start: int
    length: int
    to: int


@dataclass(frozen=True, slots=True)
class Rewrite:
    """The rows `piece` of the result's `tensor`, `row_bytes` bytes each, that `edit` computes.

    `source` is where the old rows are; None where none are read.
    """

    tensor: TensorRange
    source: TensorRange | None
    piece: Piece
    edit: Edit
    row_bytes: int

    @property
    def start(self) -> int:
        """Where the old rows begin in the source."""
        assert self.source is not None
        return self.source.start + self.piece.row * self.row_bytes

    @property
    def to(self) -> int:
        """Where the rows begin in the result."""
        return self.tensor.start + self.piece.row * self.row_bytes

    @property
    def length(self) -> int:
        """Bytes of the result."""
        return self.piece.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class ShardJobs:
    """All that makes the shard `new` from the shard `old`, but its header."""

    old: Shard
    new: Shard
    copies: list[Copy]
    rewrites: list[Rewrite]


def plan_jobs(old: Shard, new: Shard, inputs: MergeInputs) -> ShardJobs:
    """Plan the jobs that make the shard `new` from the shard `old`.

    Raises:
        ValueError: if an update would be added to integers.
    """
    copies: list[Copy] = []
    rewrites: list[Rewrite] = []
    for name, tensor in new.tensors.items():
        if name not in old.tensors:
            _plan_added_(tensor, old, inputs, copies, rewrites)
            continue
        source, position = old.tensors[name], 0  # in bytes, within the tensor
        for piece in sorted(inputs.plan.pieces.get(name, []), key=lambda piece: piece.row):
            edit = inputs.edit_of(piece.parameter)
            if edit is None:
                continue
            if edit.value is not None and tensor.shape != source.shape:
                position = source.stop - source.start
                for part in whole_pieces(name, piece.parameter, tensor.shape, edit):
                    rewrites += _split(tensor, None, part, edit)
                continue
            if not tensor.torch_dtype.is_floating_point:
                raise ValueError(
                    f"`{name}` has the dtype {tensor.dtype}; an update can only be added to floating point values."
                )
            block = BLOCK_BYTES if len(inputs.adapters) == 1 else BLOCK_BYTES // 8  # then float64, and no chunks
            found = _split(tensor, source, piece, edit, block, whole=inputs.reads_base(piece.parameter))
            begin = found[0].to - tensor.start
            copies.append(Copy(source.start + position, begin - position, tensor.start + position))
            position = begin + sum(rewrite.length for rewrite in found)
            rewrites += found
        copies.append(Copy(source.start + position, source.stop - source.start - position, tensor.start + position))
    return ShardJobs(old, new, _join(copies), rewrites)


def _plan_added_(
    tensor: TensorRange, old: Shard, inputs: MergeInputs, copies: list[Copy], rewrites: list[Rewrite]
) -> None:
    """Add the jobs of a tensor that is new to the checkpoint."""
    stored, edit = next((stored, edit) for name, stored, edit in inputs.plan.added if name == tensor.name)
    source = old.tensors[inputs.plan.tensor_of(stored)] if stored is not None else None
    if source is not None and edit == Edit() and not inputs.takes_base(tensor.name):
        copies.append(Copy(source.start, source.stop - source.start, tensor.start))
        return
    for piece in whole_pieces(tensor.name, tensor.name, tensor.shape, edit):
        rewrites += _split(tensor, source, piece, edit, whole=inputs.reads_base(tensor.name))


def _split(
    tensor: TensorRange, source: TensorRange | None, piece: Piece, edit: Edit, block: int = 0, whole: bool = False
) -> list[Rewrite]:
    """Split a piece into rewrites of at most `block` bytes, unless one row depends on all."""
    total = tensor.shape[0] if tensor.shape else 1
    if edit.experts > 1 and len(tensor.shape) == 3:
        total *= tensor.shape[1]
    row_bytes = (tensor.stop - tensor.start) // max(total, 1)
    step = max((block or BLOCK_BYTES) // max(row_bytes, 1) // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    if whole or edit.value is not None or (edit.magnitude and edit.transposed):
        step = max(piece.rows, 1)
    parts = [
        replace(piece, row=piece.row + low, rows=high - low, offset=piece.offset + low)
        for low, high in split_rows(piece.rows, step)
    ]
    return [Rewrite(tensor, source, part, edit, row_bytes) for part in parts]


def split_rows(rows: int, step: int) -> list[tuple[int, int]]:
    """Split rows into chunks of `step`, as (first, end); a last one too short for the same kernels joins its neighbour."""
    bounds = list(range(0, rows, step))
    if len(bounds) > 1 and rows - bounds[-1] < ROW_MULTIPLE:
        bounds.pop()
    return list(zip(bounds, [*bounds[1:], rows], strict=True))


def _join(copies: Sequence[Copy]) -> list[Copy]:
    """Join neighbouring copies, and split long ones into blocks that threads can share."""
    joined: list[Copy] = []
    for copy in copies:
        last = joined[-1] if joined else None
        if last and last.start + last.length == copy.start and last.to + last.length == copy.to:
            joined[-1] = Copy(last.start, last.length + copy.length, last.to)
        elif copy.length:
            joined.append(copy)
    return [
        Copy(copy.start + at, min(BLOCK_BYTES, copy.length - at), copy.to + at)
        for copy in joined
        for at in range(0, copy.length, BLOCK_BYTES)
    ]
