# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What one client can change of a release: never more than the clip, and more as soon as weights, clip or divisor are wrong."""

import hashlib
import math

import numpy as np
import pytest
import torch

from fedlpp_hf.aggregation.mean import sum_updates
from fedlpp_hf.privacy import client_level
from fedlpp_hf.privacy.client_level import BITS_SHARE, ClientMechanism, adapt_clip, sum_clipped


SHAPES = {"layer.lora_B.weight": torch.Size([6, 4]), "modules_to_save.head": torch.Size([5])}
CLIP, EXPECTED = 0.5, 4


def make_update(seed: int, norm: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    update = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    length = math.sqrt(sum(float(value.double().square().sum()) for value in update.values()))
    return {key: value * (norm / length) for key, value in update.items()}


def read_zeros(count: int) -> bytes:
    """The same noise each time, so that two releases differ by their sums alone."""
    return hashlib.shake_256(b"zero").digest(count)


def release(updates, clip=CLIP):
    mechanism = ClientMechanism(1.0, EXPECTED)
    return mechanism.release(updates, [0.0] * len(updates), clip, SHAPES, read_zeros).mean


def measure_sensitivity() -> float:
    """How far adding one client moves the sum behind a release, at most, in clips."""
    others = {
        "nobody": [],
        "one": [make_update(1, 0.3)],
        "many": [make_update(seed, 0.1 * seed) for seed in range(1, 8)],
        "huge": [make_update(1, 1e4)],
    }
    furthest = 0.0
    for rest in others.values():
        for norm in (1e-3, 0.4, 0.5, 3.0, 1e6):
            with_it, without = release([*rest, make_update(99, norm)]), release(rest)
            squares = [float((with_it[key] - without[key]).double().square().sum()) for key in SHAPES]
            furthest = max(furthest, math.sqrt(math.fsum(squares)) * EXPECTED / CLIP)
    return furthest


def test_one_client_moves_the_sum_by_a_clip_at_most():
    assert measure_sensitivity() == pytest.approx(1.0, abs=1e-5)


def test_another_weight_would_show(monkeypatch):
    """σ for a uniform mean beside weights by examples, as peers have it."""

    def weigh(updates, factors, keys, dtype):
        return sum_updates(updates, [factor * (1 + place) for place, factor in enumerate(factors)], keys, dtype)

    monkeypatch.setattr(client_level, "sum_updates", weigh)
    assert measure_sensitivity() > 1.5


def test_a_clip_that_is_left_out_would_show(monkeypatch):
    def add(updates, clip, shapes):
        return (
            sum_updates(updates, [1.0] * len(updates), list(shapes), torch.float64)
            if updates
            else sum_clipped([], clip, shapes)
        )

    monkeypatch.setattr(client_level, "sum_clipped", add)
    assert measure_sensitivity() > 1e3


def test_a_clip_of_the_factors_alone_would_show(monkeypatch):
    """`modules_to_save` belongs to the update, and to its norm."""
    whole = client_level.global_norm
    monkeypatch.setattr(
        client_level, "global_norm", lambda update: whole({k: v for k, v in update.items() if "lora" in k})
    )
    assert measure_sensitivity() > 1.05


def test_a_clip_of_each_tensor_by_itself_would_show(monkeypatch):
    def clip_each(updates, clip, shapes):
        return {
            key: sum_clipped([{key: update[key]} for update in updates], clip, {key: shapes[key]})[key]
            for key in shapes
        }

    monkeypatch.setattr(client_level, "sum_clipped", clip_each)
    assert measure_sensitivity() > 1.3


def test_a_divisor_that_counts_who_came_would_show(monkeypatch):
    original = ClientMechanism.release

    def divide(self, deltas, *values):
        return original(
            ClientMechanism(self.noise_multiplier, max(len(deltas), 1), self.clip_quantile), deltas, *values
        )

    monkeypatch.setattr(ClientMechanism, "release", divide)
    assert measure_sensitivity() > 1.5


def test_mean_of_short_updates_is_their_sum_by_the_expected_number(monkeypatch):
    """No matter how many came; and nobody's values where nobody came."""
    monkeypatch.setattr(client_level, "draw_gaussian", lambda count, read_bytes: np.zeros(count))
    updates = [make_update(seed, 0.4) for seed in range(3)]
    for number in range(4):
        mean = release(updates[:number])
        assert list(mean) == list(SHAPES)
        for key, value in mean.items():
            expected = sum(update[key].double() for update in updates[:number]) / EXPECTED
            torch.testing.assert_close(value, torch.as_tensor(expected).float().expand(value.shape))


def test_large_sums_keep_what_float32_would_round_away():
    """Ten thousand clients' sum in float32 is rounded by more than a clip's thousandth."""
    same, other = {"w": torch.full((4,), 0.5)}, {"w": torch.tensor([1e-5, 0.0, 0.0, 0.0])}
    shapes = {"w": torch.Size([4])}
    without = sum_clipped([same] * 4000, 1.0, shapes)["w"]
    with_it = sum_clipped([same] * 4000 + [other], 1.0, shapes)["w"]
    assert float(with_it[0] - without[0]) == pytest.approx(1e-5, rel=1e-6)
    assert float(with_it.float()[0] - without.float()[0]) != pytest.approx(1e-5, rel=0.1)


def test_update_of_zeros_is_one():
    zeros = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    assert all(not value.any() for value in sum_clipped([zeros], 1.0, SHAPES).values())


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_noise_on_the_sum_follows_from_the_clip(quantile):
    shapes = {"w": torch.Size([100_000])}
    for clip in (0.1, 10.0):
        found = ClientMechanism(1.5, 8, quantile).release([], [], clip, shapes)
        share = 1.0 if quantile is None else math.sqrt(1 - BITS_SHARE)
        assert found.noise_std == pytest.approx(1.5 * clip / share)
        values = found.mean["w"].double() * 8 / found.noise_std
        assert abs(float(values.var()) - 1) < 5 * math.sqrt(2 / 1e5)


def test_both_noisy_sums_together_have_the_multiplier_that_is_accounted():
    """1/z² = 1/z_Δ² + 1/(2σ_b)²: arXiv 1905.03871, Theorem 1."""
    total, bits = ClientMechanism(0.8, 10, 0.5).split_noise()
    assert total**-2 + (2 * bits) ** -2 == pytest.approx(0.8**-2) and total > 0.8
    assert ClientMechanism(0.8, 10).split_noise() == (0.8, 0.0)


def follow_quantile(quantile: float, rounds: int = 80) -> float:
    """The share of updates that is shorter than the clip in the end, of 200 with norms between 0.1 and 10."""
    norms, clip = np.geomspace(0.1, 10, 200), 0.1
    shapes = {"w": torch.Size([1])}
    mechanism = ClientMechanism(1.0, len(norms), quantile)
    for _ in range(rounds):
        clipped = [float(norm > clip) for norm in norms]
        clip = mechanism.release([{"w": torch.zeros(1)}] * len(norms), clipped, clip, shapes).next_clip
    return float((norms <= clip).mean())


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_clip_follows_the_quantile(quantile):
    assert follow_quantile(quantile) == pytest.approx(quantile, abs=0.05)


def test_a_clip_with_its_sign_turned_round_would_show(monkeypatch):
    monkeypatch.setattr(client_level, "adapt_clip", lambda clip, below, quantile: adapt_clip(clip, quantile, below))
    assert follow_quantile(0.5) == 0.0  # it runs away


def test_clip_shrinks_where_too_many_are_shorter():
    assert adapt_clip(1.0, 0.9, 0.5) < 1.0 < adapt_clip(1.0, 0.1, 0.5)
    assert adapt_clip(2.0, 0.5, 0.5) == 2.0


@pytest.mark.parametrize("said", [1e9, -1e9, 1.0, 0.0, 0.5, math.inf, math.nan])
def test_whatever_a_client_says_of_its_norm_counts_for_half_a_bit_at_most(monkeypatch, said):
    monkeypatch.setattr(client_level, "draw_gaussian", lambda count, read_bytes: np.zeros(count))
    mechanism, shapes = ClientMechanism(1.0, 10, 0.5), {"w": torch.Size([1])}
    found = mechanism.release([{"w": torch.zeros(1)}], [said], 1.0, shapes).below_clip
    assert abs(found - 0.5) * 10 <= 0.5 + 1e-9
