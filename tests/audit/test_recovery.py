# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""ROUGE on tokens, against values worked out by hand."""

import pytest

from fedlpp_hf.audit.recovery import Recovery, score_recovery, score_tokens


def test_the_rows_themselves_score_full_in_any_order():
    rows = [[1, 5, 6, 7], [1, 8, 9]]
    assert score_recovery(rows, rows[::-1], {1}) == Recovery(100, 100, 100, 100)
    assert score_recovery(rows, [], {1}) == score_recovery([[1, 2]], [[3, 4]]) == Recovery(0, 0, 0, 0)
    with pytest.raises(ValueError, match="no rows"):
        score_recovery([], rows)


def test_order_counts_for_pairs_and_subsequences_alone():
    found = score_recovery([[5, 6, 7, 8]], [[8, 5, 6, 7]])
    # Of 4 tokens all, of 3 pairs (5 6, 6 7) two, the longest common subsequence is 5 6 7.
    assert (found.rouge_1, found.rouge_l, found.exact) == (100, 75, 0)
    assert found.rouge_2 == pytest.approx(100 * 2 / 3)


def test_a_row_without_a_partner_counts_nothing_and_tokens_are_sets():
    assert score_recovery([[5, 6], [7, 8]], [[5, 6]]).rouge_l == 50
    assert score_tokens([[1, 5, 6], [5]], [5, 9], {1}) == 50
