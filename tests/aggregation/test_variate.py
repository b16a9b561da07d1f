# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The mean of the owner's estimates, and how much of it they agree on."""

import pytest
import torch

from fedlpp_hf.aggregation.variate import average_variates


def estimates(count: int, signal: float, noise: float, size: int = 20_000) -> tuple[torch.Tensor, list[dict]]:
    generator = torch.Generator().manual_seed(0)
    truth = signal * torch.randn(size, generator=generator)
    found = [truth + noise * torch.randn(size, generator=generator) for _ in range(count)]
    return truth, [{"a": value[: size // 2], "b": value[size // 2 :].view(-1, 10)} for value in found]


@pytest.mark.parametrize("count, signal, noise", [(2, 1.0, 1.0), (4, 1.0, 2.0), (8, 0.3, 1.0), (4, 1.0, 0.0)])
def test_share_is_that_of_the_wiener_filter(count, signal, noise):
    """‖R‖² / (‖R‖² + noise²/m), and no other coefficient brings the mean nearer to the truth."""
    truth, variates = estimates(count, signal, noise)
    found, share = average_variates(variates)
    assert share == pytest.approx(signal**2 / (signal**2 + noise**2 / count), abs=0.02)
    mean = torch.cat([torch.stack([one[key].flatten() for one in variates]).mean(0) for key in ("a", "b")])
    torch.testing.assert_close(torch.cat([found[key].flatten() for key in ("a", "b")]), mean)
    for other in (0.8 * share, 1.2 * share):
        assert (share * mean - truth).norm() < (other * mean - truth).norm() or noise == 0


def test_where_there_is_nothing_to_find_all_is_chance():
    _, variates = estimates(4, 0.0, 1.0)
    assert average_variates(variates)[1] < 0.05
    zeros = {"a": torch.zeros(3)}
    assert average_variates([zeros, zeros])[1] == 0.0


def test_estimates_that_contradict_each_other_share_nothing():
    one = {"a": torch.ones(4)}
    assert average_variates([one, {"a": -0.5 * one["a"]}])[1] == 0.0


def test_one_estimate_is_taken_as_it_is():
    variate = {"a": torch.tensor([1.5, -2.0])}
    found, share = average_variates([variate])
    assert share == 1.0 and torch.equal(found["a"], variate["a"])
    with pytest.raises(ValueError, match="at least one"):
        average_variates([])
