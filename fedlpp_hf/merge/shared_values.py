# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Parameters of the base model that an adapter carries along, and weights with one shared tensor."""

from collections.abc import Mapping, Sequence

import torch
from transformers.utils import logging

from ..base.full_model import FullModel
from ..base.reader import BaseReader
from .adapter_reader import AdapterReader
from .edits import Edit, SharedValue


logger = logging.get_logger(__name__)


def drop_copies(
    shared: Mapping[str, SharedValue],
    stored: Mapping[str, str],
    source: FullModel,
    adapters: Sequence[AdapterReader],
    base: BaseReader | None,
) -> dict[str, SharedValue]:
    """Leave out what an adapter carries along of the full model itself, or of its base.

    PEFT saves the frozen weight below a LoRA on a head or embedding. It stays in the list where rows were added or
    changed, as after a new vocabulary.

    Args:
        shared: by parameter.
        stored: the checkpoint's tensor of each parameter that is one tensor as it is.
        source: the full model.
        adapters: that carry the values.
        base: the quantized base, where it is known.

    Raises:
        ValueError: if an adapter carries another model's weight.
    """
    kept = {}
    for name, value in shared.items():
        if (
            not value.frozen
            or name not in stored
            or not all(_is_copy(name, value.key, source.read(stored[name]), reader, base) for reader in adapters)
        ):
            kept[name] = value
    return kept


def _is_copy(name: str, key: str, weight: torch.Tensor, reader: AdapterReader, base: BaseReader | None) -> bool:
    value = reader.read_stored(key)
    if value.shape == weight.shape:
        if torch.equal(value.to(weight.dtype), weight):
            return True
        if base is not None and name in base.entries and torch.equal(base.read(name), value.float()):
            return True
    rows = min(len(value), len(weight)) if value.dim() else 1
    # Of two dtypes, what the narrower one can tell.
    narrow = min(value.dtype, weight.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    same = (value[:rows].to(narrow) == weight[:rows].to(narrow)).reshape(rows, -1).all(dim=1)
    if same.double().mean() < 0.5:
        raise ValueError(
            f"`{key}` in `{reader.directory}` was frozen while the adapter was trained, and {rows - int(same.sum())} of its "
            f"{rows} rows are not those of the full model's `{name}`: the adapter comes from another model, or from a quantized "
            "base. Pass that base as base_dir to add the update to the full model's weight; or save the adapter with "
            "`save_pretrained(..., save_embedding_layers=False)`; or merge into the model that it was trained on."
        )
    if value.shape == weight.shape:
        logger.warning(f"`{name}` becomes what the adapter carries as `{key}`, which differs from the full model's.")
    return False


def replace_shared_(
    edits: dict[str, Edit], shared: Mapping[str, SharedValue], groups: Sequence[Sequence[str]]
) -> None:
    """Give values of the base model to all parameters that share its tensor, but for those with a value of their own.

    Args:
        edits: by parameter; values are added.
        shared: the values.
        groups: the parameters that share a tensor.
    """
    grouped = {name for group in groups for name in group}
    for group in [*groups, *([name] for name in shared if name not in grouped)]:
        keys = {name: shared[name].key for name in group if name in shared}
        for name in group if keys else ():
            edit = edits.setdefault(name, Edit())
            if edit.value is None:
                edit.value = keys.get(name, next(iter(keys.values())))


def find_odd_one(group: Sequence[str], edits: Mapping[str, Edit], adapters: Sequence[AdapterReader]) -> str | None:
    """Find a parameter of a tied group that becomes another than the first one; None if all become the same."""
    first = edits.get(group[0], Edit())
    odd = next((n for n in group[1:] if not _is_same(first, edits.get(n, Edit()), adapters)), None)
    return odd if odd is None or odd in edits else group[0]


def _is_same(one: Edit, other: Edit, adapters: Sequence[AdapterReader]) -> bool:
    if one == other:
        return True
    if one.scales != other.scales or one.experts != other.experts:
        return False
    for reader in adapters:
        if not all(
            _are_equal(reader, getattr(one, part), getattr(other, part)) for part in ("value", "bias", "magnitude")
        ):
            return False
        if (one.key_a is None) != (other.key_a is None):
            return False
        if one.key_a is not None and not all(map(torch.equal, _orient(one, reader), _orient(other, reader))):
            return False
    return True


def _are_equal(reader: AdapterReader, one: str | None, other: str | None) -> bool:
    if one is None or other is None or one == other:
        return one == other
    return torch.equal(reader.read(one), reader.read(other))


def _orient(edit: Edit, reader: AdapterReader) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors, left and right, of the update as the parameter is stored."""
    a, b = edit.load_factors(reader, None)
    return (a.T, b.T) if edit.transposed else (b, a)
