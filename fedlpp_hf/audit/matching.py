# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Rows of a causal model by optimization, where spans tell no order: what the updated model says, then a search by gradient.

The updated model continues with what it was trained on (as in extraction, arXiv 2012.07805), which gives whole rows to begin with.
Then single tokens are replaced, put in and taken out as long as the rows' gradient points more along the update (gradient matching,
arXiv 1906.08935, over tokens instead of embeddings).
"""

from collections.abc import Sequence

import torch

from .gains import GainModel
from .sequences import InversionLimits


_CHANGES = (
    0.01,
    0.1,
    0.3,
)  # of log-probabilities, by which the update is lengthened; which is best differs from case to case
_BEAMS, _BRANCHES, _KEPT = 32, 8, 4
_FINALISTS = 32
_MOST_ROWS = 2  # that are searched for: of more, the first ones
_SHORTLIST = 8  # tokens tried in each place
_ENOUGH = 0.9999  # cosine: the gradient of the very rows


def search_rows(gains: GainModel, tokens: Sequence[int], limits: InversionLimits) -> list[list[int]]:
    """The rows whose gradient points most along the update, of those that a bounded search finds.

    Args:
        gains: The model and its update.
        tokens: To make rows of: those that were found, or all.
        limits: What is known of the batch; `evaluations` bounds the gradients that are taken.
    """
    allowed = torch.tensor(sorted(set(tokens)))
    begins = [[limits.begin_token]] if limits.begin_token is not None else [[t] for t in allowed.tolist()[:_BEAMS]]
    pool: dict[tuple[int, ...], None] = {}
    for change in _CHANGES:
        length = gains.find_length(change)
        alive = [(0.0, begin) for begin in begins]
        for _ in range(limits.max_length - 1):
            best = gains.read([row for _, row in alive], length)[:, allowed].topk(min(_BRANCHES, len(allowed)), -1)
            longer = [
                (total + value, [*row, int(allowed[index])])
                for (total, row), values, indices in zip(
                    alive, best.values.tolist(), best.indices.tolist(), strict=True
                )
                for value, index in zip(values, indices, strict=True)
            ]
            alive = sorted(longer, key=lambda found: -found[0])[:_BEAMS]
            pool |= {tuple(row): None for _, row in alive[:_KEPT]}
    matches = {row: gains.measure_match([list(row)]) for row in list(pool)[-limits.evaluations // 2 :]}
    finalists = sorted(matches, key=lambda row: -matches[row])[:_FINALISTS]
    rows = [list(finalists[0])]
    while len(rows) < min(limits.num_rows, _MOST_ROWS):
        rows.append(list(max(finalists, key=lambda row: gains.measure_match([*rows, list(row)]))))
    return _improve_rows(gains, rows, allowed, limits)


def _improve_rows(
    gains: GainModel, rows: list[list[int]], allowed: torch.Tensor, limits: InversionLimits
) -> list[list[int]]:
    best, taken, improved = gains.measure_match(rows), 0, True
    while improved and best < _ENOUGH:
        improved = False
        for place, row in enumerate(rows):
            tried = [
                [*rows[:place], other, *rows[place + 1 :]] for other in _list_changes(gains, row, allowed, limits)
            ]
            taken += len(tried)
            if taken > limits.evaluations:
                return rows
            matches = [gains.measure_match(others) for others in tried]
            if max(matches) > best + 1e-6:
                best = max(matches)
                rows, improved = tried[matches.index(best)], True
    return rows


def _list_changes(gains: GainModel, row: list[int], allowed: torch.Tensor, limits: InversionLimits) -> list[list[int]]:
    """Rows that differ from `row` in one token, by those that the update raises most in that place, or makes most likely."""
    prefixes = [row[:place] for place in range(1, len(row) + 1)]
    count = min(_SHORTLIST, len(allowed))
    risen = allowed[gains.measure_rises(prefixes)[:, allowed].topk(count, -1).indices].tolist()
    likely = allowed[gains.read(prefixes, 1.0)[:, allowed].topk(count, -1).indices].tolist()
    found = []
    for place, tokens in enumerate(zip(risen, likely, strict=True), 1):
        for token in dict.fromkeys([*tokens[0], *tokens[1]]):
            if place < len(row):
                found.append([*row[:place], token, *row[place + 1 :]])
            if len(row) < limits.max_length:
                found.append([*row[:place], token, *row[place:]])
        if len(row) > 2 and place < len(row):
            found.append([*row[:place], *row[place + 1 :]])
    return found
