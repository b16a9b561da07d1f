# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Rows out of the tokens that an update gave away: by the spans of deeper layers, and by what the update raises."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .inputs import InputReader, pad_rows, split_batches
from .observed import SpanTest, find_near_limit, measure_all


_BATCH = 1024
_BEAMS = 64
_SWEEPS, _RESTARTS = 6, 4
_MOST_COMBINATIONS = 4096  # that are all tried


@dataclass(frozen=True, slots=True)
class InversionLimits:
    """What the attacker knows of the batch.

    Args:
        num_rows: Rows in it.
        max_length: Tokens of the longest row, at most.
        begin_token: The token that every row begins with, if one does.
        end_token: The token that every row ends with, if one does.
        evaluations: Gradients that the search by optimization may take; 0 leaves it out.
    """

    num_rows: int
    max_length: int
    begin_token: int | None = None
    end_token: int | None = None
    evaluations: int = 1500


def measure_rows(reader: InputReader, tests: Sequence[SpanTest], rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The distance of each place of `rows`, `(rows, length)`, NaN in padding."""
    length, found = max(map(len, rows)), []
    names = list({test.layer: None for test in tests})
    for part in split_batches(len(rows), _BATCH):
        ids, mask = pad_rows(rows[part])
        distances = measure_all(tests, reader.read(ids, names, mask)).masked_fill(mask == 0, torch.nan)
        padding = distances.new_full((len(ids), length - distances.shape[1]), torch.nan)
        found.append(torch.cat([distances, padding], 1))
    return torch.cat(found)


def grow_by_spans(
    reader: InputReader, tests: Sequence[SpanTest], tokens: Sequence[int], limits: InversionLimits
) -> list[list[int]]:
    """Rows of a causal model: prefixes whose last place lies in the spans of deeper layers, each as long as one goes on.

    A row's last token is missing, as it has no gradient.
    """
    # After copies of itself alone a token has the same inputs, whatever their number: no row is grown of copies.
    begin = [] if limits.begin_token is None else [limits.begin_token]
    tokens = [token for token in tokens if token not in begin]
    alive: list[tuple[float, list[int]]] = [(0.0, begin)]
    ended: list[tuple[float, list[int]]] = []
    for _ in range(limits.max_length - 1 - len(begin)):
        longer = [[*row, token] for _, row in alive for token in tokens]
        copies = torch.tensor([len(row) > 1 and len(set(row)) == 1 for row in longer])
        distances = measure_rows(reader, tests, longer)[:, -1].masked_fill(copies, torch.inf)
        limit = find_near_limit(distances)
        going_on: list[tuple[float, list[int]]] = []
        for place, (worst, row) in enumerate(alive):
            part = slice(place * len(tokens), (place + 1) * len(tokens))
            near = (distances[part] <= limit).nonzero().flatten().tolist()
            going_on += [(max(worst, float(distances[part][t])), longer[part][t]) for t in near]
            if not near and len(row) > len(begin):
                ended.append((worst, row))
        alive = sorted(going_on)[:_BEAMS]
        if not alive:
            break
    ended += [found for found in alive if len(found[1]) > len(begin)]
    # Of more rows than there were, the longest are the ones to believe in: a false prefix does not go on for long.
    return [row for _, row in sorted(ended, key=lambda found: (-len(found[1]), found[0]))[: limits.num_rows]]


def arrange_encoder(
    reader: InputReader, tests: Sequence[SpanTest], tokens: Sequence[Sequence[int]], limits: InversionLimits
) -> list[list[int]]:
    """Rows of an encoder from the tokens found for each place: one row is read off, several are told apart by the spans of deeper
    layers, whose inputs depend on the whole row: place by place, the token that brings the row nearest is taken, until none does."""
    lengths = [n for n in range(1, len(tokens) + 1) if limits.end_token in (None, *tokens[n - 1])] or [len(tokens)]
    if limits.num_rows == 1 or not tests:
        return [[place[0] for place in tokens[: lengths[-1]]]]
    generator = torch.Generator().manual_seed(0)
    rows: list[list[int]] = []
    for _ in range(limits.num_rows):
        best: tuple[float, list[int]] | None = None
        for length in lengths:
            places = [list(place) for place in tokens[:length]]
            if limits.end_token is not None:
                places[-1] = [limits.end_token]
                places[:-1] = [[t for t in place if t != limits.end_token] for place in places[:-1]]
            if not all(places):
                continue
            for _ in range(_RESTARTS):
                found = _climb(reader, tests, places, rows, generator)
                if found[1] and found[1] not in rows and (best is None or found[0] < best[0]):
                    best = found
        if best is None:
            break
        rows.append(best[1])
    return rows


def _climb(
    reader: InputReader, tests: Sequence[SpanTest], places: Sequence[Sequence[int]], taken: Sequence[Sequence[int]],
    generator: torch.Generator,
) -> tuple[float, list[int]]:  # fmt: skip
    """The nearest row, by its mean distance, of all where they are few; else from a random start, of tokens that no row has yet."""
    if math.prod(map(len, places)) <= _MOST_COMBINATIONS:
        rows = [list(row) for row in itertools.product(*places) if list(row) not in taken]
        means = measure_rows(reader, tests, rows).mean(1) if rows else torch.tensor([math.inf])
        return float(means.min()), rows[int(means.argmin())] if rows else []
    row = []
    for place, choices in enumerate(places):
        used = {other[place] for other in taken if len(other) > place}
        fresh = [token for token in choices if token not in used] or list(choices)
        row.append(fresh[int(torch.randint(len(fresh), (1,), generator=generator))])
    best = float(measure_rows(reader, tests, [row]).mean())
    for _ in range(_SWEEPS):
        before = best
        for place, choices in enumerate(places):
            if len(choices) == 1:
                continue
            others = [[*row[:place], token, *row[place + 1 :]] for token in choices]
            means = measure_rows(reader, tests, others).mean(1)
            if float(means.min()) < best:
                best, row = float(means.min()), others[int(means.argmin())]
        if best == before:
            break
    return best, row
