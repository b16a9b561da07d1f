# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Write adapters into the full-precision model: one pass over its files, in memory that does not grow with the model."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging

from .editor import Copy, Editor, Rewrite
from .full_model import VIEW_MARK, FullModel
from .jobs import plan_jobs, plan_layouts, start_workers, verify_shard, write_shard
from .plan import MergePlan, NeedsPeft, plan_merge
from .shards import WEIGHTS_INDEX, Shard, shares_blocks, sync_file
from .sources import BaseReader, open_adapters
from .through_peft import merge_with_peft


logger = logging.get_logger(__name__)


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
    verify: bool = False,
    delete_source_shards: bool = False,
    model_class: Any = None,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    sync: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> MergeReport:
    """Write `full_model` (a directory or a name on the Hub) with `adapter` merged into it to `output_dir`.

    Bytes that no adapter changes are copied inside the kernel; the others become W + s·B·A, computed in float32 and
    rounded once to the dtype they are stored in (LoRA, arXiv 2106.09685, §4.1; DoRA, arXiv 2402.09353, eq. 5). The result
    appears under its name when it is complete, or not at all. It is PEFT's `merge_and_unload`, without loading the model.

    Args:
        adapter: a PEFT directory or a name on the Hub; or several, of which the exact weighted mean of the products B·A
            is merged, in float64.
        weights: of the adapters, in proportion; equal by default.
        target: "full" merges into W; "base" into the dequantized Q(W) of `base_dir`, which reproduces what clients see and
            is not pushed.
        base_dir: the quantized base. With it the report has ‖E‖/‖ΔW‖, E = W − Q(W), for each layer.
        verify: read the result back and compare all of it with the source or a recomputation.
        delete_source_shards: delete each shard that was downloaded from the Hub when its merged one is written.
        model_class: the class the adapter was trained on, where the configurations don't tell.
        threads: that read, multiply and write; all cores by default.
        device: where the products are computed.
        sync: wait until the result is on disk before it gets its name.

    Raises:
        ValueError: for arguments, adapters or checkpoints that don't fit, naming the tensor or file.
        OSError: if the disk is full or not writable; then nothing is left at `output_dir`.
        RuntimeError: if verification fails, or another merge is writing there.
    """
    began = time.perf_counter()
    _check_arguments(target, base_dir, threads, device)
    destination = Path(output_dir)
    _check_destination(destination, full_model)
    adapters, shares = open_adapters(adapter, weights, token)
    report = MergeReport(str(destination), target, verified=verify)
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(_working_directory(destination))
        scratch = work / ".source" if delete_source_shards else None
        source = FullModel(full_model, scratch, revision, token)
        config = _read_config(source)
        try:
            plan = plan_merge(config, source.names, adapters, model_class)
        except NeedsPeft as reason:
            _hand_to_peft(str(reason), source, config, adapters, work, report, model_class, token, base_dir)
        else:
            base = (
                stack.enter_context(BaseReader(base_dir, plan.shapes, plan.transposed))
                if base_dir is not None
                else None
            )
            if target == "base":
                plan.config_changes[VIEW_MARK] = True
            editor = Editor(plan, adapters, shares, base, target == "base", torch.device(device))
            layouts = plan_layouts(source, plan, editor)
            jobs = _write_model(work, source, layouts, editor, threads, verify, sync)
            _write_companions(source, plan, layouts, work)
            _fill_report(report, editor, jobs)
        _publish(work, destination, sync)
    report.seconds = time.perf_counter() - began
    return report


def _write_model(
    work: Path,
    source: FullModel,
    layouts: dict[str, Shard],
    editor: Editor,
    threads: int | None,
    verify: bool,
    sync: bool,
) -> list[Copy | Rewrite]:
    """Write all shards, while the next one is downloaded."""
    files = list(layouts)
    planned = {file: plan_jobs(source.shards[file], layouts[file], editor) for file in files}
    shared = source.is_local and shares_blocks(source.fetch(files[0]), work)
    needed = sum(
        sum(job.rows * job.row_bytes for job in planned[file][1])
        if shared and new is source.shards[file]
        else new.size
        for file, new in layouts.items()
    )
    if source.scratch is not None:
        needed += 2 * max(shard.size for shard in source.shards.values())
    _check_room(work, needed)
    done: list[Copy | Rewrite] = []
    with start_workers(threads) as pool, ThreadPoolExecutor(1) as downloads:
        coming = downloads.submit(source.fetch, files[0])
        for file, following in zip(files, [*files[1:], None], strict=True):
            path, new = coming.result(), layouts[file]
            if following is not None:
                coming = downloads.submit(source.fetch, following)
            copies, rewrites = planned[file]
            write_shard(path, work / file, source.shards[file], new, copies, rewrites, editor, pool)
            if sync:
                sync_file(work / file)
            if verify:
                verify_shard(path, work / file, new, copies, rewrites, editor, pool)
            source.release(file)
            done += [*copies, *rewrites]
    return done


def _check_room(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"The merge needs {needed / 1e9:.2f} GB in `{work.parent}`, where {free / 1e9:.2f} GB are free.",
        )


def _hand_to_peft(reason, source, config, adapters, work, report, model_class, token, base_dir) -> None:
    if len(adapters) > 1 or base_dir is not None or source.scratch is not None:
        raise ValueError(
            f"The adapter needs PEFT's own merge ({reason}), which merges one adapter into W, in memory. Leave out the "
            "other adapters, base_dir and delete_source_shards."
        )
    _check_room(work, source.size)
    gigabytes = source.size / 1e9
    logger.warning(f"Merging through PEFT, because {reason}: the whole model, {gigabytes:.1f} GB, is held in memory.")
    merge_with_peft(source, config, adapters[0], work, model_class, token)
    report.through_peft, report.verified = reason, False


def _fill_report(report: MergeReport, editor: Editor, jobs: Sequence[Copy | Rewrite]) -> None:
    plan = editor.plan
    products = {name for name, edit in plan.edits.items() if edit.key_a}
    products |= {name for name, _, edit in plan.added if edit.key_a}
    report.layers = [
        LayerReport(name, norms.update**0.5, None if norms.error is None else norms.error**0.5)
        for name in plan.shapes
        if name in products and (norms := editor.norms.get(name)) is not None
    ]
    report.replaced = sorted(name for name, edit in plan.edits.items() if edit.value is not None)
    report.added = [name for name, _, _ in plan.added]
    report.bytes_rewritten = sum(job.rows * job.row_bytes for job in jobs if isinstance(job, Rewrite))
    report.bytes_copied = sum(job.length for job in jobs if isinstance(job, Copy))


def _publish(work: Path, destination: Path, sync: bool) -> None:
    shutil.rmtree(work / ".source", ignore_errors=True)
    if sync:
        for path in work.rglob("*"):
            sync_file(path)
        sync_file(work)
    os.rename(work, destination)
    if sync:
        sync_file(destination.absolute().parent)


def _check_arguments(target, base_dir, threads, device) -> None:
    if target not in ("full", "base"):
        raise ValueError(f"target={target!r}; expected 'full' (W) or 'base' (the dequantized Q(W)).")
    if target == "base" and base_dir is None:
        raise ValueError("target='base' needs `base_dir`, the quantized base to merge into.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}; expected at least one.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        raise ValueError(
            f"device={device!r} can't be used here ({error}). Give one that torch has, or 'cpu'."
        ) from error


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
        if not work.is_dir() or not os.path.samestat(os.fstat(lock), work.stat()):
            raise RuntimeError(f"Another process has just finished merging into `{output_dir}`.")
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield work
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _read_config(source: FullModel) -> Any:
    assert source.directory is not None
    try:
        config = AutoConfig.from_pretrained(source.directory)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"The configuration in `{source.directory}` can't be read ({error}).") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"`{source.model}` is quantized; an update merged into it would be rounded away. Give W.")
    return config


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
