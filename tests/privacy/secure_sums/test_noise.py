# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Sums to which clients add noise: the plain sum and their noise, with the accounted variance, whoever drops out."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from fedlpp_hf import FederatedConfig
from fedlpp_hf.privacy import noise_shares
from fedlpp_hf.privacy.noise_shares import NoiseShares, round_within
from fedlpp_hf.privacy.secure_sums.client import SumClient
from fedlpp_hf.privacy.secure_sums.fixed_point import Contribution
from fedlpp_hf.privacy.secure_sums.terms import make_terms as make_own_terms
from fedlpp_hf.privacy.skellam import draw_skellam
from fedlpp_hf.wire.messages import ClientTask, LocalOptions
from tests.privacy.secure_sums.parties import make_terms, name_clients, run


pytest.importorskip("Crypto", reason="needs the extra [privacy]")

CLIP = 0.3


def make_noisy_terms(size, multiplier=1.5, colluders=1, share=0.5, **changes):
    return make_terms(size, share, CLIP, noise=NoiseShares(multiplier, colluders, size), **changes)


def make_members(terms, count, values=None):
    values = np.zeros((count, terms.size), np.float32) if values is None else values
    return {
        name: SumClient(terms, name, Contribution(values[place], 2.5, 7))
        for place, name in enumerate(name_clients(count))
    }


def record_noise(monkeypatch):
    """Each client's noise, drawn from a seed, in the order in which they mask."""
    drawn, bits = [], random.Random(5)

    def draw(variance, count, read_bytes):
        drawn.append(draw_skellam(variance, count, bits.randbytes))
        return drawn[-1]

    monkeypatch.setattr(noise_shares, "draw_skellam", draw)
    return drawn


@pytest.mark.parametrize("lost", [(), ("site-01", "site-04")], ids=str)
def test_sum_is_the_sum_of_clipped_integers_and_of_the_noise(monkeypatch, lost):
    terms, drawn = make_noisy_terms(300), record_noise(monkeypatch)
    values = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)  # 58 clips long
    found, failures = run(terms, make_members(terms, 5, values), lost=[("shares", client) for client in lost])
    assert set(failures) == set(lost)
    left = [place for place, client in enumerate(name_clients(5)) if client not in lost]
    levels = terms.noise.levels
    clipped = sum(round_within(values[place], CLIP, levels) for place in left)
    assert len(drawn) == len(left)  # who is lost here does not even draw
    expected = clipped + sum(drawn)
    back = found.opened.mean.astype(np.float64) * len(left) / found.resolution
    assert (np.rint(back) == expected).all() and np.abs(back - expected).max() < 1e-2
    assert found.resolution == CLIP / levels
    assert np.linalg.norm(clipped) <= len(left) * levels


def test_loss_and_steps_stay_with_the_client():
    """They have no noise."""
    terms = make_noisy_terms(10)
    opened = run(terms, make_members(terms, 4))[0].opened
    assert (opened.losses, opened.steps) == (0, 0) and math.isnan(opened.loss)


@pytest.mark.parametrize(("count", "lost"), [(5, 0), (5, 2), (9, 2)])
def test_noise_of_a_real_round_is_at_least_the_accounted(count, lost):
    """Zero updates, so that the sum is noise: all shares that are in it, of which the least sum's without colluders count."""
    terms = make_noisy_terms(40_000)
    gone = [("shares", client) for client in name_clients(count)[:lost]]
    found, _ = run(terms, make_members(terms, count), lost=gone)
    assert len(found.clients) == count - lost
    noise = found.opened.mean.astype(np.float64) * len(found.clients)
    accounted = (1.5 * CLIP) ** 2
    expected = accounted * len(found.clients) / (found.threshold - 1)
    tolerance = 5 * math.sqrt(2 / terms.size)
    assert float((noise**2).mean()) / expected == pytest.approx(1, abs=tolerance)
    assert float((noise**2).mean()) * (len(found.clients) - 1) / len(found.clients) > accounted * (1 - tolerance)
    assert abs(float(noise.mean())) < 5 * math.sqrt(expected / terms.size)
    if (count, lost) == (5, 2):
        assert len(found.clients) == found.threshold  # the least sum: less noise can't be


def test_each_try_has_noise_of_its_own():
    terms = make_noisy_terms(100)
    one, other = (run(terms, make_members(terms, 3))[0].opened.mean for _ in range(2))
    assert (one != other).mean() > 0.9


def test_masked_update_hides_the_noise_too():
    """What leaves a client is uniform: neither value nor noise shows before the sum is opened."""
    terms, heard = make_noisy_terms(20_000), []
    run(terms, make_members(terms, 3), heard=heard)
    (masked,) = [data for step, client, data in heard if (step, client) == ("shares", "site-00")]
    words = np.frombuffer(masked[-80_012:], "<u4")[:20_000].astype(np.float64) / 2**32
    assert float(words.mean()) == pytest.approx(0.5, abs=0.02) and float(words.var()) == pytest.approx(
        1 / 12, rel=0.05
    )


def test_updates_that_are_too_long_are_clipped_and_not_refused():
    """A refusal would tell the server how long an update is."""
    terms = make_noisy_terms(50, 0.1, 0)
    values = np.zeros((3, 50), np.float32)
    values[0, 0] = 1e20
    opened = run(terms, make_members(terms, 3, values))[0].opened
    assert float(opened.mean[0]) * 3 == pytest.approx(CLIP, abs=6 * 0.1 * CLIP * math.sqrt(3 / 2))
    with pytest.raises(ValueError, match="NaN or infinite"):
        make_members(terms, 3, np.full((3, 50), np.nan, np.float32))


def test_nobody_takes_part_where_all_others_may_collude():
    terms = make_noisy_terms(10, colluders=2)
    found, failures = run(terms, make_members(terms, 3))
    assert found is None
    assert "may be opened with 2 clients, and 2 may collude: nobody's noise would count" in failures["site-00"]


def test_policy_counts_the_members_itself():
    terms = make_noisy_terms(10)
    members = make_members(terms, 4)
    members["site-02"] = SumClient(replace(terms, least=5), "site-02", Contribution(np.zeros(10, np.float32), 1.0, 1))
    found, failures = run(terms, members)
    assert failures == {"site-02": "4 clients are in the sum; this client's policy demands 5"}
    assert len(found.clients) == 3


class TestTerms:
    """Clip and threshold are one's own options; the noise is the task's, and all members are bound to it."""

    options = FederatedConfig(
        "out", report_to=[], use_cpu=True, secure_aggregation=True, weighting="uniform", clip_update_norm=CLIP
    )

    def make(self, **changes):
        asked = LocalOptions(**{"share_noise": 1.5, "share_colluders": 2, "share_delta": 1e-3, **changes})
        task = ClientTask("f", 1, 2, "a", 0, "ab" * 32, None, asked)
        return make_own_terms(self.options, task, 30)

    def test_noise_comes_from_the_task(self):
        terms = self.make()
        assert terms.noise == NoiseShares(1.5, 2, 30) and terms.bound == CLIP
        assert self.make(share_noise=0.0).noise is None

    @pytest.mark.parametrize("changed", [{"share_noise": 0.0}, {"share_noise": 1.4}, {"share_colluders": 1}], ids=str)
    def test_member_with_other_noise_is_found_out(self, changed):
        """A server that tells one client of less noise than the others has no sum with both."""
        terms, other = self.make(), self.make(**changed)
        assert terms.task != other.task
        members = {
            name: SumClient(
                other if name == "site-03" else terms, name, Contribution(np.zeros(30, np.float32), 1.0, 1)
            )
            for name in name_clients(4)
        }
        found, failures = run(terms, members)
        assert "another task than this client" in failures["site-03"]
        assert found is None or "site-03" not in found.clients

    @pytest.mark.parametrize("noise", [1e-3, 1e9])
    def test_noise_that_can_not_be_added_is_refused(self, noise):
        with pytest.raises(ValueError, match="Noise in shares with the multiplier"):
            self.make(share_noise=noise)

    def test_client_without_a_clip_of_its_own_takes_no_part(self):
        options = replace(self.options, clip_update_norm=None, max_update_norm=1.0)
        task = ClientTask("f", 1, 2, "a", 0, "ab" * 32, None, LocalOptions(share_noise=1.5))
        with pytest.raises(ValueError, match="leaves noise to the clients.* no clip_update_norm to measure it by"):
            make_own_terms(options, task, 30)
