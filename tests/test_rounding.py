# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Keyed rounding: unbiased over clients, the same over rounds, nobody's without the key."""

import math

import pytest
import torch

from fedlpp_hf.tensors.quantization import codebook, dequantize, quantize
from fedlpp_hf.tensors.rounding import keyed_chances, round_by_chance, round_tensors


KEY = bytes(range(32))


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def chances(client: str, count: int) -> torch.Tensor:
    return keyed_chances(KEY, client, "x", count)


class TestChances:
    def test_they_are_uniform(self):
        """Kolmogorov and Smirnov: the largest distance of 50,000 from the diagonal is below 1.95/√n (p = 0.001)."""
        found, _ = chances("a", 50_000).sort()
        steps = (torch.arange(50_000) + 0.5) / 50_000
        assert (found - steps).abs().max() < 1.95 / math.sqrt(50_000)
        assert found[0] > 0 and found[-1] < 1

    @pytest.mark.parametrize(
        "other", [(KEY, "b", "x"), (KEY, "a", "y"), (KEY[:-1] + b"\0", "a", "x"), (KEY, 'a", "x', "")], ids=str
    )
    def test_key_client_and_tensor_change_them_all(self, other):
        mine, theirs = chances("a", 10_000), keyed_chances(*other, 10_000)
        assert abs(torch.corrcoef(torch.stack([mine, theirs]))[0, 1]) < 4 / math.sqrt(10_000)

    def test_no_round_changes_them(self):
        assert torch.equal(chances("a", 100), chances("a", 100))
        assert torch.equal(chances("a", 50), chances("a", 100)[:50])


class TestRounding:
    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
    def test_a_value_goes_to_one_of_the_levels_around_it(self, bits):
        tensor = normal(1000).view(20, 50)
        found = round_by_chance(tensor, bits, 64, chances("a", 1000))
        assert found.scales.shape == (16,) and found.shape == (20, 50)
        scaled = tensor.view(-1) / found.scales.repeat_interleave(64)[:1000]
        back = dequantize(found).view(-1) / found.scales.repeat_interleave(64)[:1000]
        levels = codebook(bits)
        gap = levels.diff()[(torch.bucketize(scaled, levels) - 1).clamp(0, len(levels) - 2)]
        assert ((back - scaled).abs() <= gap * (1 + 1e-5)).all()
        assert ((back > scaled).any() and (back < scaled).any()) if bits > 1 else True

    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
    def test_levels_stay_what_they_are(self, bits):
        """A quantized tensor, zeros and all, is rounded to itself whatever the chances."""
        tensor = torch.cat([dequantize(quantize(normal(256), bits, 64)), torch.zeros(64)])
        found = dequantize(round_by_chance(tensor, bits, 64, chances("a", 320)))
        torch.testing.assert_close(found, tensor, rtol=1e-6, atol=0)

    def test_mean_over_clients_is_the_value(self):
        """k clients together come closer by √k: what colluders gain. Rounding to the nearest level keeps its bias."""
        tensor = normal(4000)
        rounded = torch.stack(
            [dequantize(round_by_chance(tensor, 2, 64, chances(f"c{client}", 4000))) for client in range(64)]
        )
        errors = {k: float((rounded[:k].mean(0) - tensor).norm()) for k in (1, 4, 16, 64)}
        for k in (4, 16, 64):
            assert errors[1] / errors[k] == pytest.approx(math.sqrt(k), rel=0.1)
        nearest = float((dequantize(quantize(tensor, 2, 64)) - tensor).norm())
        assert errors[16] < nearest < errors[1]

    def test_mean_over_rounds_is_not(self):
        """A client that is sent the same adapter often learns nothing by averaging; fresh chances would give it away."""
        tensor = normal(4000)
        sticky, fresh = (
            torch.stack([dequantize(round_by_chance(tensor, 2, 64, chances(name, 4000))) for name in names])
            for names in (["a"] * 16, [f"a {number}" for number in range(16)])
        )
        one = (sticky[0] - tensor).norm()
        torch.testing.assert_close(sticky.mean(0), sticky[0])
        assert one / (fresh.mean(0) - tensor).norm() == pytest.approx(4, rel=0.1)

    @pytest.mark.parametrize("bits, block_size, value, words", [
        (5, 64, 0.0, "no codebook"), (2, 0, 0.0, "positive number"), (2, 64, math.nan, "`w` has values that are NaN"),
        (2, 64, math.inf, "infinite"),
    ])  # fmt: skip
    def test_bad_input_is_refused(self, bits, block_size, value, words):
        with pytest.raises(ValueError, match=words):
            round_by_chance(torch.full((8,), value), bits, block_size, torch.full((8,), 0.5), "w")

    def test_an_adapter_is_rounded_tensor_by_tensor(self):
        adapter = {"a": normal(100).view(10, 10), "b": torch.zeros(3, 5)}
        found = round_tensors(adapter, 3, 16, KEY, "client")
        assert found.keys() == adapter.keys() and not dequantize(found["b"]).any()
        again = round_by_chance(adapter["a"], 3, 16, keyed_chances(KEY, "client", "a", 100))
        assert torch.equal(found["a"].codes, again.codes)
