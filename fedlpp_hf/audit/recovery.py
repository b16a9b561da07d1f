# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""How much of the true rows an attack recovered: ROUGE on tokens, and rows that are exact."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


Row = Sequence[int]


@dataclass(frozen=True, slots=True)
class Recovery:
    """Means over the true rows, in percent: F-measures of ROUGE (Lin 2004) on token ids, and the share of rows that are exact.

    `rouge_1` compares tokens, `rouge_2` pairs of neighbours, `rouge_l` the longest common subsequence. Tokens are the tokenizer's,
    not words, so the figures are not those of the package rouge_score on text; 100 means the same in both.
    """

    rouge_1: float
    rouge_2: float
    rouge_l: float
    exact: float


def score_recovery(true: Sequence[Row], found: Sequence[Row], ignored: Iterable[int] = ()) -> Recovery:
    """Score `found` rows against the `true` ones, the best pairs by ROUGE-L matched first; a row without a partner counts 0.

    Args:
        true: Rows of tokens.
        found: What an attack made of the update, in any order.
        ignored: Tokens that count for neither, such as those that begin and end every row.

    Raises:
        ValueError: if there is no true row.
    """
    if not true:
        raise ValueError("There are no rows to compare with; expected at least one.")
    left = set(ignored)
    true, found = ([[token for token in row if token not in left] for row in rows] for rows in (true, found))
    if not found:
        return Recovery(0.0, 0.0, 0.0, 0.0)
    scores = {(a, b): _rouge_l(row, other) for a, row in enumerate(true) for b, other in enumerate(found)}
    pairs: dict[int, int] = {}
    for a, b in sorted(scores, key=lambda pair: -scores[pair]):
        if a not in pairs and b not in pairs.values():
            pairs[a] = b

    def mean(measure) -> float:
        return 100 * sum(measure(true[a], found[b]) for a, b in pairs.items()) / len(true)

    return Recovery(
        rouge_1=mean(lambda a, b: _rouge_n(a, b, 1)),
        rouge_2=mean(lambda a, b: _rouge_n(a, b, 2)),
        rouge_l=mean(_rouge_l),
        exact=mean(lambda a, b: float(list(a) == list(b))),
    )


def score_tokens(true: Sequence[Row], found: Iterable[int], ignored: Iterable[int] = ()) -> float:
    """The F-measure, in percent, of the set of tokens that were found against the set of those in the rows."""
    left = set(ignored)
    wanted = {token for row in true for token in row} - left
    given = set(found) - left
    return 100 * _f_measure(len(wanted & given), len(given), len(wanted))


def _rouge_n(a: Row, b: Row, n: int) -> float:
    left, right = (Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1)) for row in (a, b))
    if not left and not right:  # rows too short to have any
        return float(list(a) == list(b))
    return _f_measure((left & right).total(), left.total(), right.total())


def _rouge_l(a: Row, b: Row) -> float:
    lengths = [0] * (len(b) + 1)
    for token in a:
        diagonal = 0
        for place, other in enumerate(b, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if token == other else max(above, lengths[place - 1])
            diagonal = above
    return _f_measure(lengths[-1], len(a), len(b))


def _f_measure(common: int, a: int, b: int) -> float:
    return 2 * common / (a + b) if a + b else 1.0
