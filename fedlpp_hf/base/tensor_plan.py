# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which tensors of a checkpoint make which parameters of the model, by transformers' own rules."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from .full_model import FullModel


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Which tensors of a checkpoint make which parameters of a model.

    `groups`: for each first parameter made, the conversion (None if only the name differs) and its inputs as
    `(pattern, name in the checkpoint)`. `missing`: parameters that no tensor makes. `left_out`: tensors that make no
    parameter.
    """

    groups: dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]]
    missing: list[str]
    left_out: list[str]

    def read(self, full_model: FullModel, model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
        """Read the parameters as (name, value), with one group of the checkpoint's tensors in memory at a time.

        Raises:
            ValueError: if a shape is not the one that `model` has.
        """
        state = model.state_dict()
        for first, (converter, inputs) in self.groups.items():
            if converter is None:
                made: dict[str, Any] = {first: full_model.read(inputs[0][1])}
            else:
                converter = deepcopy(converter)
                for pattern, name in inputs:
                    converter.add_tensor(first, name, pattern, full_model.read(name))
                made = converter.convert(first, model=model, config=model.config)
            for name, tensor in made.items():
                tensor = tensor[0] if isinstance(tensor, list) else tensor
                check_shape(name, tuple(tensor.shape), tuple(state[name].shape), model)
                yield name, tensor


def check_shape(name: str, stored: tuple[int, ...], expected: tuple[int, ...], model: PreTrainedModel) -> None:
    """Refuse a tensor of another shape than the model's parameter.

    Args:
        name: of the tensor.
        stored: its shape.
        expected: the parameter's shape.
        model: the model.

    Raises:
        ValueError: naming it.
    """
    if stored != expected:
        raise ValueError(
            f"`{name}` has shape {stored} in the checkpoint; {type(model).__name__} has {expected}. Does the "
            "configuration belong to these weights?"
        )


def plan_tensors(model: PreTrainedModel, names: Iterable[str]) -> TensorPlan:
    """Match the tensors of a checkpoint to the model's parameters, as `from_pretrained` does for its class."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, tied = model.state_dict(), model.all_tied_weights_keys
    groups: dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]] = {}
    left_out, made = [], set()
    for source in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, state)
        if name not in state and source in state:
            name, pattern = rename_source_key(source, [], [], model.base_model_prefix, state)
        if name not in state:
            left_out.append(source)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        groups.setdefault(name, (converter, []))[1].append((pattern or "", source))
        made.add(name)
        if converter is not None:
            target = converter.target_patterns[0]
            made |= {name.replace(target, other) for other in converter.target_patterns}
    for copy, original in tied.items():
        if copy in made and original in made and copy in groups:  # a tied weight, stored twice
            left_out.extend(source for _, source in groups.pop(copy)[1])
        elif original in made:
            made.add(copy)
        elif copy in made:
            made.add(original)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return TensorPlan(groups, sorted(parameters - made), sorted(left_out))
