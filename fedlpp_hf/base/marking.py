# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Tracing a suspect back to the client whose copy of a base it came from."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..privacy.marks import Trace, Tracer
from ..tensors.codebooks import codebook, nf4_subset
from ..tensors.quantization import round_to_levels
from .full_model import FullModel
from .mark_keys import MarkKey
from .mark_places import find_mark_places
from .modules import build_meta_model, count_weights, default_skip_modules, find_quantized, make_quantization_config
from .suspect import SuspectReader
from .tensor_plan import plan_tensors


def trace_base(
    suspect: str | os.PathLike,
    key: MarkKey,
    full_model: str | os.PathLike | None = None,
    token: str | None = None,
) -> list[Trace]:
    """Find out whose copy a suspect was made of, the likeliest client first.

    The suspect may be a base, or a model in any floating dtype that came of one: with an adapter merged in, fine-tuned,
    requantized and restored, pruned, or put together of several copies.

    Args:
        suspect: A directory, or a name on the Hub.
        key: Of the owner.
        full_model: Where the full model is now, if it has moved.
        token: For the Hub.

    Raises:
        ValueError: if the suspect is of another architecture than the full model, or can't be read.
    """
    source = FullModel(full_model or key.full_model, token=token)
    tracer = Tracer(bytes.fromhex(key.secret), key.clients)
    reader = SuspectReader(suspect, token)
    bits, block_size = key.settings["bits"], key.settings["block_size"]
    levels = codebook(4)[list(nf4_subset(bits))]
    compared = 0
    for name, weight, model_weights in _read_marked(source, key.settings):
        if not reader.has(name, weight.shape):
            continue
        compared += 1
        _, scales = round_to_levels(weight, levels, block_size, name=name)
        places, lower, marked = find_mark_places(weight, levels, scales, block_size, model_weights)
        places, lower = places[marked], lower[marked].long()
        scales = scales[places // block_size]
        values = reader.read(name, weight.shape).reshape(-1)[places]
        tracer.add(name, _place_between(values, levels[lower] * scales, levels[lower + 1] * scales), marked.numpy())
    if not compared:
        raise ValueError(
            f"`{suspect}` has none of the full model's marked weights, by name and shape; it is of another architecture."
        )
    return list(tracer.results())


def _place_between(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> np.ndarray:
    """Where values stand between two levels: −1 at the lower, 1 at the upper, and what is beyond counts as there."""
    width = (high - low).clamp(min=1e-38)
    placed = ((values.float() - low) * 2 / width - 1).clamp(-1, 1)
    return placed.nan_to_num(0.0).double().numpy()


def _read_marked(source: FullModel, settings: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor, int]]:
    """The full model's weights that copies have in 4-bit codes, as these store them, `(out, in)`, and how many there are."""
    config = source.read_config()
    model = build_meta_model(config, _find_class(settings["model_class"]))
    skip = settings["skip_modules"] or default_skip_modules(model)
    config.quantization_config = make_quantization_config(4, False, skip, source.dtype)
    quantized = find_quantized(model, config)
    model_weights = count_weights(model, quantized)
    for name, tensor in plan_tensors(model, source.shapes).read(source, model):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in quantized:
            yield name, tensor.T.contiguous() if quantized[module] else tensor, model_weights


def _find_class(name: str | None) -> Any:
    import transformers

    return None if name is None else getattr(transformers, name)
