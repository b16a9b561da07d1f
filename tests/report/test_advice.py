# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which preset is recommended, and how it is said and drawn."""

import numpy as np
import pytest

from fedlpp_hf.report.advice import (
    Estimate,
    PresetResult,
    draw_advice,
    estimate_mean,
    is_better,
    recommend,
    render_advice,
)


NOTHING = Estimate(0.0, 0.0, 0.0)
UNKNOWN = Estimate(None, None, None)


def make_result(name, gain, stolen=NOTHING, healed=0.9, noise=0.1, seed=0, **changes) -> PresetResult:
    """A preset that lowers the loss of 200 rows by `gain` on average; `noise` is of its own, rows' difficulty is shared."""
    before = np.random.default_rng(9).normal(2.0, 1.0, 200)
    after = before - gain + np.random.default_rng(seed).normal(0, noise, 200)
    values = {
        "before": before.tolist(), "after": after.tolist(), "stolen": stolen, "exposure": Estimate(0.8, 0.7, 0.9),
        "healed": Estimate(healed, healed, healed), "base_bytes": 4_000_000, "down": 1500, "up": 2500, "seconds": 61.0,
    }  # fmt: skip
    return PresetResult(name, f"does {name}", {"base_bits": 4}, **values | changes)


def test_mean_has_the_interval_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(1.0, 2.0, 400)
    found = estimate_mean(values)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 20)
    assert estimate_mean(np.array([1.0, np.nan])) == estimate_mean(np.array([])) == UNKNOWN


def test_rows_are_compared_in_pairs():
    """The difficulty of rows, which is most of their spread, is the same for both."""
    one, other = make_result("a", 0.3, seed=1), make_result("b", 0.2, seed=2)
    assert is_better(one, other) and not is_better(other, one) and not is_better(one, one)
    assert estimate_mean(np.array(one.after)).low < np.mean(other.after)  # what unpaired rows could not tell


def test_largest_gain_within_the_limit_is_recommended():
    stolen = Estimate(0.6, 0.4, 0.8)
    results = [make_result("sent", 0.5, stolen), make_result("a", 0.1, seed=1), make_result("b", 0.3, seed=2)]
    found = recommend(results, 0.1)
    assert found.name == "b" and "Over the limit: sent 60% (40% to 80%)" in found.reason
    assert "No other preset within the limit gains as much" in found.reason
    assert recommend(results, 0.9).name == "sent"


def test_upper_bound_of_the_stolen_value_counts():
    assert recommend([make_result("a", 0.3, Estimate(0.05, -0.1, 0.2))], 0.1).name is None
    assert recommend([make_result("a", 0.3, UNKNOWN)], 0.5).name is None  # what can't be told is not within a limit


def test_presets_that_can_not_be_told_apart_are_said_to_be_equal():
    coarse, fine = make_result("coarse", 0.3, healed=0.5, seed=1), make_result("fine", 0.301, healed=0.9, seed=2)
    found = recommend([fine, coarse], 0.1)
    assert found.name == "coarse" and "can't be told from that of fine" in found.reason
    assert "healed exposure 50%" in found.reason


def test_no_gain_beyond_noise_is_no_recommendation():
    found = recommend([make_result("a", 0.001, noise=1.0), make_result("b", -0.5)], 0.1)
    assert found.name is None and "beyond the noise of 200 test rows" in found.reason


def test_failed_presets_are_shown_and_not_chosen():
    failed = PresetResult("a", "does a", {}, failure="Failed: out of memory")
    assert recommend([failed], 0.1).reason == "No preset could be run to its end."
    found = recommend([failed, make_result("b", 0.3)], 0.1)
    text = render_advice([failed, make_result("b", 0.3)], found, ["Facts."])
    assert found.name == "b" and "does a. Failed: out of memory" in text and "b (recommended)" in text


def test_advice_says_what_it_can_not_know(tmp_path):
    results = [make_result("a", 0.3, accuracy=[0.5, 0.75]), make_result("b", 0.1, Estimate(0.5, 0.2, 0.9), seed=3)]
    found = recommend(results, 0.1)
    text = render_advice(results, found, ["12 rows."])
    assert "**Recommended: a.**" in text and "more alike than partners will be" in text and "0.500 → 0.750" in text
    assert "| 4.0 MB | 1.5 kB | 2.5 kB | 61 " in text and "base_bits: 4" in text
    assert "**No preset is recommended.**" in render_advice(results[1:], recommend(results[1:], 0.1), [])
    pytest.importorskip("matplotlib")
    for shown in (results, [make_result("c", 0.1, UNKNOWN, healed=None)], []):
        assert draw_advice(shown, recommend(shown, 0.1), 0.1, tmp_path / "advice.png")
        assert (tmp_path / "advice.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
