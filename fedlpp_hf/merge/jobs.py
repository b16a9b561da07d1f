# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The merge's work on files: which ranges are copied, which are rewritten, done by a pool of threads."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..tensors.files import TensorRange
from .editor import BLOCK_BYTES, ROW_MULTIPLE, Copy, Editor, Rewrite, split_rows
from .full_model import FullModel
from .locations import Edit, Piece, whole_pieces
from .plan import MergePlan
from .shards import Shard, change_layout, clone_file, read_shard, write_range


_DTYPE_NAMES = ("F32", "BF16", "F16", "F64")


def plan_layouts(source: FullModel, plan: MergePlan, editor: Editor) -> dict[str, Shard]:
    """Every shard as it will be: with changed shapes where a value has another, and added tensors."""
    where = {name: file for file, shard in source.shards.items() for name in shard.tensors}
    dtypes = Counter(t.dtype for s in source.shards.values() for t in s.tensors.values())
    common = next((d for d, _ in dtypes.most_common() if d in _DTYPE_NAMES), "F32")
    stored_as = {pieces[0].parameter: name for name, pieces in plan.pieces.items()}
    changes: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {file: {} for file in source.shards}
    for name, pieces in plan.pieces.items():
        edit, tensor = plan.edits.get(pieces[0].parameter), source.shards[where[name]].tensors[name]
        if edit is not None and edit.value is not None and len(pieces) == 1:
            changes[where[name]][name] = (tensor.dtype, editor.adapters[0].shape(edit.value))
    for name, stored, edit in plan.added:
        if stored is not None:
            name_of = stored_as[stored]
            tensor = source.shards[where[name_of]].tensors[name_of]
            changes[where[name_of]][name] = (tensor.dtype, tensor.shape)
        else:
            assert edit.value is not None
            changes[max(source.shards)][name] = (common, editor.adapters[0].shape(edit.value))
    return {file: change_layout(shard, changes[file]) for file, shard in source.shards.items()}


def plan_jobs(old: Shard, new: Shard, editor: Editor) -> tuple[list[Copy], list[Rewrite]]:
    """The copies and rewrites that make the shard `new` (its header is written apart) from the shard `old`."""
    copies: list[Copy] = []
    rewrites: list[Rewrite] = []
    added = {name: (stored, edit) for name, stored, edit in editor.plan.added}
    stored_as = {pieces[0].parameter: name for name, pieces in editor.plan.pieces.items()}
    for name, tensor in new.tensors.items():
        source = old.tensors.get(name)
        pieces = editor.plan.pieces.get(name, [])
        if source is None:
            stored, change = added[name]
            source = old.tensors[stored_as[stored]] if stored is not None else None
            if source is not None and change == Edit() and not editor.takes_base(name):
                copies.append(Copy(source.start, source.stop - source.start, tensor.start))
            else:
                for piece in whole_pieces(name, name, tensor.shape, change):
                    rewrites += _split(tensor, source, piece, change, whole=editor.reads_base(name))
            continue
        position = 0  # in bytes, within the tensor
        for piece in sorted(pieces, key=lambda piece: piece.row):
            edit = editor.edit_of(piece.parameter)
            if edit is None:
                continue
            if edit.value is not None and tensor.shape != source.shape:
                position = source.stop - source.start
                for part in whole_pieces(name, piece.parameter, tensor.shape, edit):
                    rewrites += _split(tensor, None, part, edit)
                continue
            if not tensor.torch_dtype.is_floating_point:
                raise ValueError(
                    f"`{name}` is of {tensor.dtype}; an update can only be added to floating point values."
                )
            block = BLOCK_BYTES if len(editor.adapters) == 1 else BLOCK_BYTES // 8  # then float64, and no chunks
            found = _split(tensor, source, piece, edit, block, whole=editor.reads_base(piece.parameter))
            begin = found[0].to - tensor.start
            copies.append(Copy(source.start + position, begin - position, tensor.start + position))
            position = begin + sum(r.rows * r.row_bytes for r in found)
            rewrites += found
        copies.append(Copy(source.start + position, source.stop - source.start - position, tensor.start + position))
    return _join(copies), rewrites


def _split(
    tensor: TensorRange, source: TensorRange | None, piece: Piece, edit: Edit, block: int = 0, whole: bool = False
) -> list[Rewrite]:
    """A piece as rewrites of at most `block` bytes, unless it takes all rows to compute one."""
    total = tensor.shape[0] if tensor.shape else 1
    if edit.experts > 1 and len(tensor.shape) == 3:
        total *= tensor.shape[1]
    row_bytes = (tensor.stop - tensor.start) // max(total, 1)
    step = max((block or BLOCK_BYTES) // max(row_bytes, 1) // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    if whole or edit.value is not None or (edit.magnitude and edit.transposed):
        step = max(piece.rows, 1)
    return [
        Rewrite(
            tensor,
            piece.parameter,
            edit,
            piece.expert,
            piece.offset + low,
            high - low,
            row_bytes,
            None if source is None else source.start + (piece.row + low) * row_bytes,
            tensor.start + (piece.row + low) * row_bytes,
        )
        for low, high in split_rows(piece.rows, step)
    ]


def _join(copies: Sequence[Copy]) -> list[Copy]:
    """Neighbouring copies as one, and long ones in blocks that threads can share."""
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


def write_shard(
    source: Path,
    destination: Path,
    old: Shard,
    new: Shard,
    copies: Sequence[Copy],
    rewrites: Sequence[Rewrite],
    editor: Editor,
    pool: ThreadPoolExecutor,
) -> None:
    """Write one merged shard, its copies and rewrites overlapping."""
    with open(source, "rb", buffering=0) as reader, open(destination, "xb", buffering=0) as writer:
        inputs, output = reader.fileno(), writer.fileno()
        jobs: list[Copy | Rewrite] = sorted([*copies, *rewrites], key=lambda job: job.to)
        if new is old and clone_file(inputs, output):
            jobs = list(rewrites)
        else:
            write_range(output, new.header, 0)
            os.ftruncate(output, new.size)
        run_jobs(jobs, editor, inputs, output, pool)


def verify_shard(
    source: Path,
    destination: Path,
    new: Shard,
    copies: Sequence[Copy],
    rewrites: Sequence[Rewrite],
    editor: Editor,
    pool: ThreadPoolExecutor,
) -> None:
    """Read a merged shard back: its header, every copied byte, and every rewritten one against a recomputation.

    Raises:
        RuntimeError: naming what differs.
    """
    with open(source, "rb", buffering=0) as reader, open(destination, "rb", buffering=0) as result:
        with contextlib.suppress(OSError):
            os.posix_fadvise(result.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, as far as can be
        if read_shard(destination) != new or os.pread(result.fileno(), len(new.header), 0) != new.header:
            raise RuntimeError(f"The header of `{destination.name}` is not what was written; the disk is damaged.")
        run_jobs([*copies, *rewrites], editor, reader.fileno(), result.fileno(), pool, verify=True)


@contextlib.contextmanager
def start_workers(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads compute with one core each; torch's own threads would only get in their way."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads or os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # the count is the thread's own, but also what later threads start with


def run_jobs(
    jobs: Sequence[Copy | Rewrite],
    editor: Editor,
    source: int,
    destination: int,
    pool: ThreadPoolExecutor,
    verify: bool = False,
) -> None:
    """Do jobs, or check that they were done, on all threads of `pool`; the first failure ends them all."""
    futures = [pool.submit(editor.run, job, source, destination, verify) for job in jobs]
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:  # the descriptors must outlive every job
            future.cancel()
        for future in futures:
            if not future.cancelled():
                future.exception()
