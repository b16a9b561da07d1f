# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The robust means are those of their papers, coordinate by coordinate or by the scores of whole clients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlpp_hf.aggregation.robust import coordinate_median, gram_matrix, krum_weights, trimmed_mean

from .dense import make_adapter


def make_rows(honest: int, attackers: int) -> list[dict[str, torch.Tensor]]:
    """Attackers, which flip the honest mean, and honest clients."""
    g = torch.Generator().manual_seed(0)
    good = [{"w": 1 + torch.randn(300, generator=g)} for _ in range(honest)]
    bad = {"w": -10 * torch.stack([update["w"] for update in good]).mean(0)}
    return [bad] * attackers + good


def test_krum_picks_an_honest_client_and_multi_krum_drops_the_attackers():
    gram = gram_matrix(make_rows(7, 4))
    assert sum(krum_weights(gram, 4, 1)[4:]) == 1
    assert krum_weights(gram, 4, 7) == [0.0] * 4 + [1.0] * 7


def test_krum_scores_are_the_papers():
    updates = make_rows(5, 2)
    rows = torch.stack([update["w"] for update in updates]).double()
    scores = [sum(sorted(float((rows[i] - rows[j]).square().sum()) for j in range(7) if j != i)[:3]) for i in range(7)]
    assert krum_weights(gram_matrix(updates), 2, 1).index(1.0) == scores.index(min(scores))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 99))
def test_coordinate_rules_are_the_dense_ones(count, seed):
    updates = [make_adapter(seed + k, 2) for k in range(count)]
    median = coordinate_median(updates)
    for key, tensor in median.items():
        rows = torch.stack([update[key] for update in updates]).double()
        torch.testing.assert_close(tensor.double(), rows.quantile(0.5, dim=0))
        for trim in range((count + 1) // 2):
            ordered = rows.sort(0).values[trim : count - trim].mean(0)
            torch.testing.assert_close(trimmed_mean(updates, trim)[key].double(), ordered)


def test_pieces_of_a_tensor_are_put_together(monkeypatch):
    updates = [make_adapter(k, 2) for k in range(5)]
    whole, gram = coordinate_median(updates), gram_matrix(updates)
    monkeypatch.setattr("fedlpp_hf.aggregation.robust._CHUNK_VALUES", 35)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in coordinate_median(updates).items())
    torch.testing.assert_close(gram_matrix(updates), gram)


def test_too_many_attackers_are_refused():
    updates = [make_adapter(k, 2) for k in range(4)]
    with pytest.raises(ValueError, match="needs 5 updates"):
        trimmed_mean(updates, 2)
    with pytest.raises(ValueError, match="needs 5 updates"):
        krum_weights(gram_matrix(updates), 1, 3)


def test_krum_selects_no_more_than_the_honest_ones():
    gram = gram_matrix(make_rows(5, 2))
    for selected in (0, 6):
        with pytest.raises(ValueError, match=f"1 to 5 of 7 updates, not {selected}"):
            krum_weights(gram, 2, selected)
