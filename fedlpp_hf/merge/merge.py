# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Writing adapters into the full-precision model, in one pass over its files."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..base.contents import TOKENIZER_FILES, check_link
from ..base.full_model import FullModel
from ..base.reader import BaseReader
from ..base.shards import WEIGHTS, WEIGHTS_INDEX, Shard
from ..base.tensor_plan import TensorPlan, plan_tensors
from ..tensors.scratch import working_directory
from .adapter_reader import AdapterReader, open_adapters
from .destination import VIEW_MARK, check_destination, publish, scratch_directory
from .jobs import plan_jobs
from .layouts import plan_layouts
from .loading import check_loads, read_shapes
from .peft_models import AdaptedModel, NeedsPeft, build_models
from .plan import MergeInputs, MergePlan, plan_merge
from .report import MergeReport
from .rows import RowProducer
from .through_peft import check_alone, merge_through_peft
from .writing import write_shards


logger = logging.get_logger(__name__)


def merge_adapter(
    full_model: str | os.PathLike,
    adapter: str | os.PathLike | Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    base_dir: str | os.PathLike | None = None,
    base_weight: float = 0.0,
    verify: bool = False,
    delete_source_shards: bool = False,
    model_class: Any = None,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    sync: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> MergeReport:
    """Write the full model with an adapter merged into it. Returns what was done.

    Weights that no adapter changes are copied; the others become W + s·B·A, computed in float32 and rounded once to the
    dtype they are stored in (LoRA, arXiv 2106.09685, §4.1; DoRA, arXiv 2402.09353, eq. 5). This is PEFT's
    `merge_and_unload`, without loading the model.

    Args:
        full_model: a directory, or a name on the Hub.
        adapter: a PEFT directory, or a name on the Hub; or several, of which the exact weighted mean of the products B·A is
            merged, in float64.
        output_dir: the new directory. It appears when it is complete, or not at all.
        weights: of the adapters, in proportion; equal by default.
        base_dir: the quantized base. With it the report has ‖E‖/‖ΔW‖, E = W − Q(W), for each layer.
        base_weight: λ, from 0 to 1: the update is added to W − λE, for all weights that `base_dir` has quantized. An adapter
            that was trained on Q(W) fits a model between the two. At 1 the result is what clients see, and is not pushed.
        verify: read the result back, and compare all of it with the source or a second computation.
        delete_source_shards: delete each shard downloaded from the Hub when its merged one is written.
        model_class: the class that the adapter was trained on, where the configurations don't tell.
        threads: that read, multiply and write; by default one per core.
        device: where the products are computed.
        sync: wait until the result is on disk before it gets its name.
        revision: branch, tag or commit of the full model on the Hub.
        token: for the Hub; by default that of `hf auth login`.

    Raises:
        ValueError: for arguments, adapters or checkpoints that don't fit, naming the tensor or file.
        OSError: if the disk is full or not writable; then nothing is left at `output_dir`.
        RuntimeError: if verification fails, or another merge is writing there.
    """
    began = time.perf_counter()
    _check_arguments(base_weight, base_dir, threads, device)
    destination = Path(output_dir)
    check_destination(destination, full_model)
    adapters, shares = open_adapters(adapter, weights, token)
    report = MergeReport(str(destination), base_weight, verified=verify)
    with working_directory(destination, "merging into") as work:
        source = FullModel(full_model, revision, token, scratch_directory(work) if delete_source_shards else None)
        found = _find_changes(source, adapters, model_class, base_dir)
        _warn_of_nothing(adapters)
        if isinstance(found.plan, str):
            check_alone(found.plan, len(adapters), base_dir is not None, source)
            merge_through_peft(found.plan, source, found.adapted, adapters[0], work)
            check_loads(work, found.adapted.model, found.tensors, read_shapes(work))
            report.through_peft, report.verified = found.plan, False
        else:
            plan = found.plan
            if base_weight == 1:
                plan.config_changes[VIEW_MARK] = True
            inputs = MergeInputs(plan, adapters, shares, found.base, base_weight)
            layouts = plan_layouts(source, inputs)
            shards = {file: plan_jobs(source.shards[file], new, inputs) for file, new in layouts.items()}
            if _write_companions(source, plan, layouts, work):
                shapes = {t.name: t.shape for shard in layouts.values() for t in shard.tensors.values()}
                check_loads(work, found.adapted.model, found.tensors, shapes)
            producer = RowProducer(inputs, torch.device(device))
            norms = write_shards(work, source, shards, producer, threads=threads, verify=verify, sync=sync)
            report.record_(plan, norms, shards.values())
        if found.adapted.tokens is not None:
            _take_tokenizer(adapters[0].directory, work, found.adapted.tokens[1])
        publish(work, destination, sync)
    report.seconds = time.perf_counter() - began
    return report


def check_merge(
    full_model: str | os.PathLike,
    adapter: str | os.PathLike,
    *,
    base_dir: str | os.PathLike | None = None,
    model_class: Any = None,
    revision: str | None = None,
    token: str | None = None,
) -> None:
    """Find out whether an adapter can be merged, from the headers of the full model, before one is trained.

    Args:
        full_model: a directory, or a name on the Hub.
        adapter: a PEFT directory; its values do not matter.
        base_dir: the quantized base, if the merge is to move towards it.
        model_class: the class that the adapter is trained on, where the configurations don't tell.
        revision: branch, tag or commit of the full model on the Hub.
        token: for the Hub; by default that of `hf auth login`.

    Raises:
        ValueError: as [`merge_adapter`] does.
    """
    adapters, shares = open_adapters(adapter, None, token)
    source = FullModel(full_model, revision, token)
    found = _find_changes(source, adapters, model_class, base_dir)
    if isinstance(found.plan, str):
        check_alone(found.plan, len(adapters), base_dir is not None, source)
    else:
        inputs = MergeInputs(found.plan, adapters, shares)
        for file, new in plan_layouts(source, inputs).items():
            plan_jobs(source.shards[file], new, inputs)


@dataclass(frozen=True, slots=True)
class _Changes:
    """What is to be done: `plan` is a plan, or why only PEFT can do it."""

    adapted: AdaptedModel
    tensors: TensorPlan
    base: BaseReader | None
    plan: MergePlan | str


def _find_changes(
    source: FullModel, adapters: Sequence[AdapterReader], model_class: Any, base_dir: str | os.PathLike | None
) -> _Changes:
    adapted = build_models(source.read_config(), adapters, model_class)
    model = adapted.model
    tensors = plan_tensors(model, source.shapes)
    source.check_scales(tensors.left_out)
    base = None
    if base_dir is not None:
        transposed = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
        base = BaseReader(base_dir, adapted.before, transposed, model.base_model_prefix)
    try:
        return _Changes(adapted, tensors, base, plan_merge(adapted, tensors, source, adapters, base))
    except NeedsPeft as reason:
        return _Changes(adapted, tensors, base, str(reason))


def _warn_of_nothing(adapters: Sequence[AdapterReader]) -> None:
    for reader in adapters:
        if reader.is_zero:
            logger.warning(
                f"Every B of the adapter in `{reader.directory}` is zero, as before any training: its update is zero, and merging "
                "it changes no weight but those that it replaces. Is it the trained one?"
            )


def _check_arguments(
    base_weight: float, base_dir: str | os.PathLike | None, threads: int | None, device: str | torch.device
) -> None:
    if not 0 <= base_weight <= 1:
        raise ValueError(f"base_weight={base_weight}; expected a number from 0 (merge into W) to 1 (into Q(W)).")
    if base_weight and base_dir is None:
        raise ValueError(
            f"base_weight={base_weight} needs `base_dir`, the quantized base that the adapter was trained on."
        )
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}; expected at least one.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        raise ValueError(
            f"device={device!r} can't be used here ({error}). Give a device that torch has, or 'cpu'."
        ) from error


def _take_tokenizer(adapter: Path, work: Path, tokens: int) -> None:
    """Put the tokenizer with which an adapter was trained, if it lies beside it, in the place of the full model's."""
    if not (adapter / "tokenizer_config.json").is_file():
        logger.warning(
            f"The merged model has {tokens} tokens, and the tokenizer is the full model's: copy the one of the training to it."
        )
        return
    for name in TOKENIZER_FILES:
        (work / name).unlink(missing_ok=True)
        if (adapter / name).is_file():
            shutil.copyfile(check_link(adapter, adapter / name), work / name)


def _write_companions(source: FullModel, plan: MergePlan, layouts: Mapping[str, Shard], work: Path) -> bool:
    """Copy the other files of the full model, with the changes to its configuration and index.

    Returns whether anything in them is new, so that the model might no longer load.
    """
    source.copy_companions(work)
    config = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
    changed = _change_json(config, plan.config_changes)
    if changed != config:
        (work / "config.json").write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
    is_new = changed != config or any(new is not source.shards[file] for file, new in layouts.items())
    if WEIGHTS in source.shards:
        return is_new
    index = json.loads((source.directory / WEIGHTS_INDEX).read_text(encoding="utf-8"))
    weight_map = {name: file for file, shard in layouts.items() for name in shard.tensors}
    if not is_new and weight_map == index["weight_map"]:
        shutil.copyfile(source.directory / WEIGHTS_INDEX, work / WEIGHTS_INDEX)
        return is_new
    if any(new is not source.shards[file] for file, new in layouts.items()):
        index.setdefault("metadata", {})["total_size"] = sum(s.size - len(s.header) for s in layouts.values())
    (work / WEIGHTS_INDEX).write_text(
        json.dumps(index | {"weight_map": weight_map}, indent=2) + "\n", encoding="utf-8"
    )
    return is_new


def _change_json(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change values, also in configurations within; what an old layout has at the top is changed there."""
    changed = dict(config)
    for key, value in changes.items():
        if isinstance(value, Mapping) and key not in ("id2label", "label2id"):
            inner = changed.get(key)
            changed = changed | {key: _change_json(inner, value)} if isinstance(inner, dict) else changed | dict(value)
        else:
            changed[key] = value
    return changed
