# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Whether `from_pretrained` will load a merged model, told by its configuration and headers."""

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from ..base.modules import build_meta_model
from ..base.shards import read_shards
from ..base.tensor_plan import TensorPlan, plan_tensors


def read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a checkpoint."""
    return {t.name: t.shape for shard in read_shards(directory).values() for t in shard.tensors.values()}


def check_loads(work: Path, model: PreTrainedModel, before: TensorPlan, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a merged model that would not load, or not whole.

    Args:
        work: the directory with its configuration.
        model: the model that was merged into.
        before: which tensors of the full model make its parameters.
        shapes: of the tensors of the merged model.

    Raises:
        ValueError: naming a tensor that is missing, has no place, or has another shape than the configuration says.
    """
    merged = build_meta_model(AutoConfig.from_pretrained(work), type(model))
    plan, state = plan_tensors(merged, shapes), merged.state_dict()
    problems = [
        f"`{name}` has shape {shapes[inputs[0][1]]}, where its configuration says {tuple(state[name].shape)}"
        for name, (converter, inputs) in plan.groups.items()
        if converter is None and shapes[inputs[0][1]] != tuple(state[name].shape)
    ]
    problems += [f"`{name}` is missing" for name in plan.missing if name not in before.missing]
    problems += [f"`{name}` has no place" for name in plan.left_out if name in shapes and name not in before.left_out]
    if problems:
        raise ValueError(
            f"The merged {type(model).__name__} could not be loaded: {problems[0]} ({len(problems)} such tensors). Nothing was "
            "written. Merge with PEFT on the model as it was trained, and report this adapter."
        )
