# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Where each parameter is stored: in which tensors of the checkpoint, and in which of their rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Split

from ..base.tensor_plan import TensorPlan, check_shape
from .edits import Edit


@dataclass(frozen=True, slots=True)
class Piece:
    """`rows` rows of a tensor, from `row` on: they are the rows of a parameter, or of one expert, from `offset` on."""

    tensor: str
    row: int
    rows: int
    parameter: str
    expert: int | None = None
    offset: int = 0


def locate_parameters(
    model: PreTrainedModel,
    tensors: TensorPlan,
    stored: Mapping[str, tuple[int, ...]],
    edits: Mapping[str, Edit],
) -> tuple[dict[str, list[Piece]], set[str]]:
    """Find the pieces of each parameter, and the parameters that are not whole rows of any tensor.

    Args:
        model: the model, without memory for its weights.
        tensors: which tensors make which parameters.
        stored: the shapes of the checkpoint's tensors.
        edits: by parameter; one that is replaced may have another shape.

    Raises:
        ValueError: if a tensor has another shape than its parameter.
    """
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    pieces: dict[str, list[Piece]] = {}
    rearranged: set[str] = set()
    for first, (converter, inputs) in tensors.groups.items():
        sources = [name for _, name in inputs]
        if converter is None:
            edit = edits.get(first)
            if edit is None or edit.value is None:
                check_shape(sources[0], stored[sources[0]], state[first], model)
            found: list[Piece] | None = whole_pieces(sources[0], first, state[first], edit)
        else:
            patterns = [[name for pattern, name in inputs if pattern == p] for p in converter.source_patterns]
            outputs = [first.replace(converter.target_patterns[0], p) for p in converter.target_patterns]
            found = _find_rows(converter.operations, patterns, outputs, state, stored)
            if found is None:
                rearranged.update(outputs)
        for piece in found or []:
            pieces.setdefault(piece.parameter, []).append(piece)
    return pieces, rearranged


def whole_pieces(tensor: str, parameter: str, shape: tuple[int, ...], edit: Edit | None) -> list[Piece]:
    """The pieces of a parameter that is one tensor as it is: one piece, or one for each expert.

    Args:
        tensor: the tensor's name.
        parameter: the parameter's name.
        shape: of both.
        edit: what is done to it, if anything.
    """
    if edit is None or edit.experts == 1:
        return [Piece(tensor, 0, shape[0] if shape else 1, parameter)]
    return [Piece(tensor, expert * shape[1], shape[1], parameter, expert) for expert in range(shape[0])]


def _find_rows(
    operations: Sequence[Any],
    patterns: Sequence[Sequence[str]],
    outputs: Sequence[str],
    state: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, tuple[int, ...]],
) -> list[Piece] | None:
    """The pieces of a conversion that moves whole rows; None for one that does more."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    sources = [name for group in patterns for name in group]
    pieces, row = [], 0
    if kinds in ([(Chunk, 0)], [(Split, 0)]) and len(sources) == 1:  # fused in the file, separate in the model
        for output in outputs:
            pieces.append(Piece(sources[0], row, state[output][0], output))
            row += state[output][0]
        return pieces if row == stored[sources[0]][0] else None
    if kinds == [(Concatenate, 0)] and len(outputs) == 1:  # separate in the file, fused in the model
        for name in sources:
            pieces.append(Piece(name, 0, stored[name][0], outputs[0], None, row))
            row += stored[name][0]
        return pieces if row == state[outputs[0]][0] else None
    experts = kinds == [(MergeModulelist, 0)] or kinds == [(MergeModulelist, 0), (Concatenate, 1)]
    if experts and len(outputs) == 1 and all(len(stored[name]) == 2 for name in sources):
        for group in patterns:  # one tensor per expert in the file; each group is a range of the fused rows
            for expert, name in enumerate(group):
                pieces.append(Piece(name, 0, stored[name][0], outputs[0], expert, row))
            row += stored[group[0]][0] if group else 0
        return pieces if row == state[outputs[0]][1] else None
    return None
