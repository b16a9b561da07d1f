# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Rows of tokens out of one update: first which tokens, then in which order (DAGER, arXiv 2405.15586), and what spans can't tell.

The attacker is the server, or who reads its disk: it has the base, the proxy, the update, the tokenizer and the configuration. A
span test is exact where it is possible; it is not where more inputs were seen than the rank tells apart, where the optimizer's step
is no sum of gradients (more than one step of Adam), or where noise, dropout or quantization cover the small directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..tensors.lora import lora_factors
from .gains import GainModel
from .inputs import InputReader, split_batches
from .matching import search_rows
from .observed import ObservedUpdate, SpanTest, build_tests, find_near_limit, measure_all
from .sequences import InversionLimits, arrange_encoder, grow_by_spans


_BATCH = 16_384  # tokens that are read at once
_MOST_TOKENS = 4000  # found: more than these is none
_DEEPER_GROUPS = 3  # layers after the first by which sequences are tested


@dataclass(frozen=True, slots=True)
class Inversion:
    """What an update gave away.

    `tokens` are those that were found, by place in the row (all places together, `[tokens]`, where the layer does not see places).
    `rows` are sequences made of them. `by` says how tokens and order were found: `spans`, `optimization` or `nothing`. `match` is the
    cosine of a causal model's update and the rows' gradient: 1 tells the attacker that these are the rows, if there was one step
    of SGD.
    """

    tokens: list[list[int]]
    rows: list[list[int]]
    by: tuple[str, str]
    match: float | None


def invert_update(model: Any, update: ObservedUpdate, peft_config: Any, limits: InversionLimits) -> Inversion:
    """Find rows of tokens behind `update`; empty where it tells none.

    Args:
        model: The base with the adapter, as a client holds it. Its adapter is put back as it was.
        update: As seen.
        peft_config: The adapter's.
        limits: What is known of the batch.

    Raises:
        ValueError: if the model takes no tokens, or its adapter is not on the first block.
    """
    targets = lora_factors(update.start, peft_config)
    gains = GainModel(model, update)
    with gains.held(update.start):
        reader = InputReader(model, list(targets))
        tests = [
            build_tests(update, [targets[name] for name in group]) for group in reader.groups[: 1 + _DEEPER_GROUPS]
        ]
        tokens = find_tokens(reader, tests[0], limits) if tests[0] else []
        deeper = [test for group in tests[1:] for test in group]
        found = sorted({token for place in tokens for token in place})
        if reader.causal and gains.predicts_tokens:
            rows = gains.finish_rows(grow_by_spans(reader, deeper, found, limits)) if found and deeper else []
            order = "spans"
            if len(rows) < limits.num_rows and limits.evaluations:
                # Deeper layers see more different inputs than the first, and drift with training.
                others = gains.finish_rows(search_rows(gains, found or range(reader.vocabulary), limits), replace=True)
                if gains.measure_match(others) > gains.measure_match(rows):
                    rows, order = others, "optimization"
            order = order if rows else "nothing"
            return Inversion(tokens, rows, ("spans" if found else "nothing", order), gains.measure_match(rows))
        if reader.causal:  # a classifier's last token has a gradient, and so a place in the spans
            rows = (
                grow_by_spans(reader, deeper, found, replace(limits, max_length=limits.max_length + 1))
                if found and deeper
                else []
            )
        else:
            rows = arrange_encoder(reader, deeper, tokens, limits) if tokens else []
        order = "spans" if deeper and rows else "nothing"
        return Inversion(tokens, rows, ("spans" if tokens else "nothing", order), None)


def find_tokens(reader: InputReader, tests: Sequence[SpanTest], limits: InversionLimits) -> list[list[int]]:
    """Tokens whose input of the first layer lies in the span, by place, nearest first; the places end where none is found."""
    length = limits.max_length if reader.positional else 1
    parts = []
    for part in split_batches(reader.vocabulary, max(_BATCH // length, 1)):
        ids = torch.arange(reader.vocabulary)[part, None].expand(-1, length)
        parts.append(measure_all(tests, reader.read(ids, [*{test.layer: None for test in tests}])))
    distances = torch.cat(parts)
    near = distances <= find_near_limit(distances.flatten())
    found: list[list[int]] = []
    for place in range(length):
        tokens = near[:, place].nonzero().flatten()
        if len(tokens) == 0 or len(tokens) > _MOST_TOKENS:
            break
        found.append(tokens[distances[tokens, place].argsort()].tolist())
    return found
