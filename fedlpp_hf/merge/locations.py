# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What happens to a parameter, and which rows of which tensors in the files it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Split

from ..base.checkpoint import TensorPlan
from .sources import AdapterReader


@dataclass(slots=True)
class Edit:
    """What adapters do to one parameter of the model, seen as a matrix: each expert of a 3-d one is a matrix.

    `key_a`, `key_b`: the factors' keys, ΔW = s·B·A, with one s in `scales` for each adapter; `transposed` where the
    parameter is stored `(in, out)`; `experts` where factors of all experts are stacked; `magnitude`: DoRA's vector;
    `bias`: a vector to add, scaled; `value`: the tensor that takes the parameter's place.
    """

    key_a: str | None = None
    key_b: str | None = None
    scales: tuple[float, ...] = ()
    transposed: bool = False
    experts: int = 1
    magnitude: str | None = None
    bias: str | None = None
    value: str | None = None

    def load_factors(self, reader: AdapterReader, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A `(r, in)` and B `(out, r)` of one expert, float32."""
        assert self.key_a is not None and self.key_b is not None
        a, b = reader.read(self.key_a).flatten(1), reader.read(self.key_b).flatten(1)
        if self.experts > 1:  # as in peft.tuners.lora.ParamWrapper
            a = a.view(self.experts, -1, a.shape[1])[expert or 0]
            b = b.view(b.shape[0], -1, self.experts)[:, :, expert or 0].contiguous()
        return a, b


@dataclass(frozen=True, slots=True)
class Piece:
    """`rows` rows of a checkpoint's tensor, from `row` on, are those of a parameter (of one expert) from `offset` on."""

    tensor: str
    row: int
    rows: int
    parameter: str
    expert: int | None = None
    offset: int = 0


def locate_parameters(
    model: PreTrainedModel,
    tensors: TensorPlan,
    names: Mapping[str, tuple[int, ...]],
    edits: Mapping[str, Edit],
) -> tuple[dict[str, list[Piece]], set[str]]:
    """Where each parameter is stored, and the parameters that no rows of any file are."""
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    pieces: dict[str, list[Piece]] = {}
    rearranged: set[str] = set()
    for first, (converter, inputs) in tensors.groups.items():
        sources = [name for _, name in inputs]
        if converter is None:
            edit = edits.get(first)
            if names[sources[0]] != state[first] and (edit is None or edit.value is None):
                raise ValueError(
                    f"`{sources[0]}` has shape {names[sources[0]]} in the checkpoint; {type(model).__name__} has "
                    f"{state[first]}. Does the configuration belong to these weights?"
                )
            found: list[Piece] | None = whole_pieces(sources[0], first, state[first], edit)
        else:
            patterns = [[name for pattern, name in inputs if pattern == p] for p in converter.source_patterns]
            outputs = [first.replace(converter.target_patterns[0], p) for p in converter.target_patterns]
            found = _convert(converter.operations, patterns, outputs, state, names)
            if found is None:
                rearranged.update(outputs)
        for piece in found or []:
            pieces.setdefault(piece.parameter, []).append(piece)
    return pieces, rearranged


def whole_pieces(tensor: str, parameter: str, shape: tuple[int, ...], edit: Edit | None) -> list[Piece]:
    """A checkpoint's tensor that is one parameter, as it is."""
    if edit is None or edit.experts == 1:
        return [Piece(tensor, 0, shape[0] if shape else 1, parameter)]
    return [Piece(tensor, expert * shape[1], shape[1], parameter, expert) for expert in range(shape[0])]


def _convert(
    operations: Sequence[Any],
    patterns: Sequence[Sequence[str]],
    outputs: Sequence[str],
    state: Mapping[str, tuple[int, ...]],
    names: Mapping[str, tuple[int, ...]],
) -> list[Piece] | None:
    """Pieces of a conversion that moves whole rows; None for one that does more."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    sources = [name for group in patterns for name in group]
    pieces, row = [], 0
    if kinds in ([(Chunk, 0)], [(Split, 0)]) and len(sources) == 1:  # fused in the file, separate in the model
        for output in outputs:
            pieces.append(Piece(sources[0], row, state[output][0], output))
            row += state[output][0]
        return pieces if row == names[sources[0]][0] else None
    if kinds == [(Concatenate, 0)] and len(outputs) == 1:  # separate in the file, fused in the model
        for name in sources:
            pieces.append(Piece(name, 0, names[name][0], outputs[0], None, row))
            row += names[name][0]
        return pieces if row == state[outputs[0]][0] else None
    experts = kinds == [(MergeModulelist, 0)] or kinds == [(MergeModulelist, 0), (Concatenate, 1)]
    if experts and len(outputs) == 1 and all(len(names[name]) == 2 for name in sources):
        for group in patterns:  # one tensor per expert in the file; each group is a range of the fused rows
            for expert, name in enumerate(group):
                pieces.append(Piece(name, 0, names[name][0], outputs[0], expert, row))
            row += names[group[0]][0] if group else 0
        return pieces if row == state[outputs[0]][1] else None
    return None
