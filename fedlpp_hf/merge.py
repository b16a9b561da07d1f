# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Write adapters into the full-precision model: one pass over its files, in memory that does not grow with the model."""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging

from .full_model import FullModel
from .merge_engine import Copy, Editor, Rewrite, plan_jobs
from .merge_plan import MergePlan, NeedsPeft, plan_merge
from .merge_sources import BaseReader, open_adapters
from .shards import WEIGHTS, WEIGHTS_INDEX, Shard, change_layout, clone_file, read_shard, sync_file, write_range


logger = logging.get_logger(__name__)

_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One parameter that the adapter updates: the Frobenius norm of ΔW, and of E = W − Q(W) where a base was given."""

    parameter: str
    update_norm: float
    error_norm: float | None = None

    @property
    def ratio(self) -> float | None:
        """‖E‖/‖ΔW‖: well below 1, W + ΔW and Q(W) + ΔW are much the same model; above, they are not."""
        if self.error_norm is None or not self.update_norm:
            return None
        return self.error_norm / self.update_norm


@dataclass(slots=True)
class MergeReport:
    """What a merge did. Bytes are of the result; `layers` are in the model's order; `through_peft` says why, if so."""

    output_dir: str
    target: str
    layers: list[LayerReport] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    bytes_copied: int = 0
    bytes_rewritten: int = 0
    seconds: float = 0.0
    verified: bool = False
    through_peft: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with each layer's ratio."""
        layers = [asdict(layer) | {"ratio": layer.ratio} for layer in self.layers]
        return asdict(self) | {"layers": layers}


def merge_adapter(
    full_model: str | os.PathLike,
    adapter: str | os.PathLike | Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    target: str = "full",
    base_dir: str | os.PathLike | None = None,
    model_class: Any = None,
    verify: bool = False,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    delete_source_shards: bool = False,
    sync: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> MergeReport:
    """Write `full_model` (a directory or a name on the Hub) with `adapter` merged into it to `output_dir`.

    Bytes that no adapter changes are copied inside the kernel; the others become W + s·B·A, computed in float32 and
    rounded once to the dtype they are stored in (LoRA, arXiv 2106.09685, §4.1; DoRA, arXiv 2402.09353, eq. 5). The result
    appears under its name when it is complete, or not at all. It is PEFT's `merge_and_unload`, without loading the model.

    Args:
        adapter: a PEFT directory or a name on the Hub; or several, or a directory of clients' updates, of which the exact
            weighted mean of the products B·A is merged, in float64.
        weights: of the adapters, in proportion; equal by default, and numbers of examples for clients' updates.
        target: "full" merges into W; "base" into the dequantized Q(W) of `base_dir`, which reproduces what clients see.
        base_dir: the quantized base. With it the report has ‖E‖/‖ΔW‖, E = W − Q(W), for each layer.
        model_class: the class the adapter was trained on, where the configurations don't tell.
        verify: read the result back and compare all of it with the source or a recomputation.
        threads: that read, multiply and write; all cores by default.
        device: where the products are computed.
        delete_source_shards: delete each shard that was downloaded from the Hub when its merged one is written.
        sync: wait until the result is on disk before it gets its name.

    Raises:
        ValueError: for arguments, adapters or checkpoints that don't fit, naming the tensor or file.
        OSError: if the disk is full or not writable; then nothing is left at `output_dir`.
        RuntimeError: if verification fails.
    """
    began = time.perf_counter()
    output_dir = Path(output_dir)
    if target not in ("full", "base"):
        raise ValueError(f"target={target!r}; expected 'full' (W) or 'base' (the dequantized Q(W)).")
    if target == "base" and base_dir is None:
        raise ValueError("target='base' needs `base_dir`, the quantized base to merge into.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}; expected at least one.")
    _check_destination(output_dir, full_model)
    adapters, shares = open_adapters(adapter, weights, token)
    with _working_directory(output_dir) as work, contextlib.ExitStack() as stack:
        scratch = work / ".source" if delete_source_shards else None
        source = FullModel(full_model, scratch, revision, token)
        config = _read_config(source)
        report = MergeReport(str(output_dir), target)
        try:
            plan = plan_merge(config, source.names, adapters, model_class)
        except NeedsPeft as reason:
            raise ValueError(str(reason)) from reason
        base = BaseReader(base_dir, plan.transposed) if base_dir is not None else None
        if base is not None:
            stack.callback(base.close)
            _add_base_pieces(plan, base)
        editor = Editor(plan, adapters, shares, base, target == "base", torch.device(device))
        layouts = _plan_layouts(source, plan, editor)
        _check_space(work, sum(shard.size for shard in layouts.values()), source if scratch else None)
        with ThreadPoolExecutor(threads or os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for file, new in layouts.items():
                old, path = source.shards[file], source.fetch(file)
                copies, rewrites = plan_jobs(old, new, editor)
                write_shard(path, work / file, old, new, copies, rewrites, editor, pool)
                if sync:
                    sync_file(work / file)
                if verify:
                    verify_shard(path, work / file, new, copies, rewrites, editor, pool)
                source.release(file)
                report.bytes_rewritten += sum(job.rows * job.row_bytes for job in rewrites)
                report.bytes_copied += sum(job.length for job in copies)
        _write_companions(source, plan, layouts, work)
        if sync:
            for path in work.rglob("*"):
                sync_file(path)
            sync_file(work)
        report.layers = [
            LayerReport(name, norms.update**0.5, None if norms.error is None else norms.error**0.5)
            for name, norms in sorted(editor.norms.items())
            if name in plan.edits or name in {added for added, _, _ in plan.added}
        ]
        report.replaced = sorted(name for name, edit in plan.edits.items() if edit.value is not None)
        report.added = [name for name, _, _ in plan.added]
        report.verified = verify
        if scratch is not None and scratch.exists():
            shutil.rmtree(scratch)
        os.rename(work, output_dir)
    if sync:
        sync_file(output_dir.parent)
    report.seconds = time.perf_counter() - began
    return report


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
        _run_all(jobs, editor, inputs, output, pool)


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
        _run_all([*copies, *rewrites], editor, reader.fileno(), result.fileno(), pool, verify=True)


def _run_all(
    jobs: Sequence[Copy | Rewrite],
    editor: Editor,
    source: int,
    destination: int,
    pool: ThreadPoolExecutor,
    verify: bool = False,
) -> None:
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


def _check_destination(output_dir: Path, full_model: str | os.PathLike) -> None:
    if output_dir.is_symlink() or (output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir()))):
        raise ValueError(f"`{output_dir}` exists and is not an empty directory; choose another, or remove it.")
    if not Path(full_model).is_dir():
        return
    source, destination = Path(full_model).resolve(), output_dir.resolve()
    if source == destination or source in destination.parents or destination in source.parents:
        raise ValueError(
            f"`{output_dir}` and the full model `{full_model}` lie in each other; choose a place beside it."
        )


@contextlib.contextmanager
def _working_directory(output_dir: Path) -> Iterator[Path]:
    """A hidden sibling of `output_dir`, removed unless it was renamed; left by a killed merge, it is used again."""
    output_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = output_dir.absolute().parent / f".{output_dir.name}.merging"
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"Another process is merging into `{output_dir}` right now.") from error
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield work
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _check_space(work: Path, needed: int, remote: FullModel | None) -> None:
    if remote is not None:
        needed += max(shard.size for shard in remote.shards.values())
    free = shutil.disk_usage(work).free
    if free < needed:
        raise OSError(
            28, f"The merge needs {needed / 1e9:.2f} GB in `{work.parent}`, where {free / 1e9:.2f} GB are free."
        )


def _read_config(source: FullModel) -> Any:
    assert source.directory is not None
    try:
        config = AutoConfig.from_pretrained(source.directory)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"The configuration in `{source.directory}` can't be read ({error}).") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"`{source.model}` is quantized; an update merged into it would be rounded away. Give W.")
    return config


def _add_base_pieces(plan: MergePlan, base: BaseReader) -> None:
    """Refuse a base that was quantized from another model."""
    unknown = sorted(set(base.entries) - set(plan.shapes))
    if unknown:
        raise ValueError(f"The base has `{unknown[0]}`, which the full model does not; it was exported from another.")


def _plan_layouts(source: FullModel, plan: MergePlan, editor: Editor) -> dict[str, Shard]:
    """Every shard as it will be: with changed shapes where a value has another, and added tensors."""
    where = {name: file for file, shard in source.shards.items() for name in shard.tensors}
    dtypes = Counter(t.dtype for s in source.shards.values() for t in s.tensors.values())
    common = next((d for d, _ in dtypes.most_common() if d in _DTYPE_NAMES.values()), "F32")
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


def _write_companions(source: FullModel, plan: MergePlan, layouts: dict[str, Shard], work: Path) -> None:
    source.copy_companions(work)
    assert source.directory is not None
    text = (source.directory / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    if any(config.get(key) != value for key, value in plan.config_changes.items()):
        (work / "config.json").write_text(json.dumps(config | plan.config_changes, indent=2) + "\n", encoding="utf-8")
    if source.weight_map is None:
        return
    index = json.loads((source.directory / WEIGHTS_INDEX).read_text(encoding="utf-8"))
    index["weight_map"] = {name: file for file, shard in layouts.items() for name in shard.tensors}
    if plan.added:
        index.setdefault("metadata", {})["total_size"] = sum(s.size - len(s.header) for s in layouts.values())
    if index["weight_map"] == source.weight_map:
        shutil.copyfile(source.directory / WEIGHTS_INDEX, work / WEIGHTS_INDEX)
    else:
        (work / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


__all__ = ["WEIGHTS", "LayerReport", "MergeReport", "merge_adapter"]
