# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The shards of the result: headers with changed shapes and added tensors."""

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping

from ..base.full_model import FullModel
from ..base.shards import Shard
from ..tensors.headers import STORED, TensorRange
from .plan import MergeInputs


_FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")


def plan_layouts(source: FullModel, inputs: MergeInputs) -> dict[str, Shard]:
    """Plan each shard of the result: other shapes for values that have them, and added tensors."""
    where = {name: file for file, shard in source.shards.items() for name in shard.tensors}
    dtypes = Counter(t.dtype for s in source.shards.values() for t in s.tensors.values())
    common = next((d for d, _ in dtypes.most_common() if d in _FLOAT_DTYPES), "F32")
    changes: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {file: {} for file in source.shards}
    for name, pieces in inputs.plan.pieces.items():
        edit, tensor = inputs.plan.edits.get(pieces[0].parameter), source.shards[where[name]].tensors[name]
        if edit is not None and edit.value is not None and len(pieces) == 1:
            changes[where[name]][name] = (tensor.dtype, inputs.adapters[0].shape(edit.value))
    for name, stored, edit in inputs.plan.added:
        if stored is not None:
            twin = inputs.plan.tensor_of(stored)
            tensor = source.shards[where[twin]].tensors[twin]
            changes[where[twin]][name] = (tensor.dtype, tensor.shape)
        else:
            assert edit.value is not None
            changes[max(source.shards)][name] = (common, inputs.adapters[0].shape(edit.value))
    return {file: change_layout(shard, changes[file]) for file, shard in source.shards.items()}


def change_layout(shard: Shard, changes: Mapping[str, tuple[str, tuple[int, ...]]]) -> Shard:
    """Change the (dtype, shape) of some tensors, and add others at the end. The shard itself if nothing differs."""
    same = {name: (tensor.dtype, tensor.shape) for name, tensor in shard.tensors.items()}
    wanted = same | dict(changes)
    if wanted == same:
        return shard
    old = json.loads(shard.header[8:])
    header = {"__metadata__": old["__metadata__"]} if "__metadata__" in old else {}
    offsets, position = {}, 0
    for name, (dtype, shape) in wanted.items():
        if name in shard.tensors and name not in changes:  # maybe of a dtype that torch does not have
            length = shard.tensors[name].stop - shard.tensors[name].start
        else:
            length = STORED[dtype].itemsize * math.prod(shape)
        offsets[name] = (position, position + length)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + length]}
        position += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    tensors = {
        name: TensorRange(name, *wanted[name], start + offsets[name][0], start + offsets[name][1]) for name in wanted
    }
    return Shard(shard.file, struct.pack("<Q", len(text)) + text, tensors, start + position)
