# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which weights carry a mark: few, in columns that nothing hangs on, and the same wherever they are looked for."""

import pytest
import torch

from fedlpp_hf import export_base
from fedlpp_hf.base import mark_places
from fedlpp_hf.base.mark_keys import MarkKey, prepare_mark
from fedlpp_hf.base.mark_places import find_mark_places
from fedlpp_hf.base.marking import trace_base
from fedlpp_hf.tensors.codebooks import codebook
from fedlpp_hf.tensors.quantization import round_to_levels


LEVELS = codebook(4)
SETTINGS = {"bits": 4, "block_size": 64, "skip_modules": None, "model_class": None}


def find(weight: torch.Tensor, model_weights: int):
    _, scales = round_to_levels(weight, LEVELS, 64)
    places, lower, marked = find_mark_places(weight, LEVELS, scales, 64, model_weights)
    widths = (LEVELS[lower.long() + 1] - LEVELS[lower.long()]) * scales[places // 64]
    return places, widths, marked


def make_weight() -> torch.Tensor:
    """Some columns are ten times smaller than the others, as those that read massive activations are, and some larger."""
    weight = torch.randn(1024, 320, generator=torch.Generator().manual_seed(0))
    weight[:, :64] *= 0.1
    weight[:, -64:] *= 3
    return weight


def test_marks_are_the_weights_share_of_a_fixed_number_in_ordinary_columns():
    weight = make_weight()
    places, widths, marked = find(weight, model_weights=40 * weight.numel())
    assert marked.sum() == 410 < len(places) / 5  # 2¹⁴ / 40
    norms = weight.norm(dim=0)
    ordinary = (norms[places % 320].log() - norms.median().log()).abs()
    assert ordinary[marked].max() < 0.1 < ordinary.max()
    rivals = ~marked & (ordinary < ordinary[marked].min() + 1e-3)
    assert rivals.any() and widths[rivals].min() >= widths[marked].max()


def test_all_weights_of_a_small_model_that_can_be_are_marked():
    weight = make_weight()
    places, _, marked = find(weight, model_weights=weight.numel())
    assert len(places) > 1000 and marked.all()


def test_weight_without_candidates_has_none():
    places, _, marked = find(torch.ones(2, 64), model_weights=128)
    assert len(places) == len(marked) == 0


def test_copy_that_was_marked_throughout_is_traced_by_fewer_marks(wide_llama, tmp_path, monkeypatch):
    """What is drawn for a weight does not depend on which are marked: a copy made with other marks keeps its trace."""
    for marks in (1 << 30, 200):
        monkeypatch.setattr(mark_places, "_MARKS", marks)
        for client in ("a", "b"):
            mark = prepare_mark(tmp_path / "key.json", client, wide_llama, SETTINGS)
            export_base(wide_llama, tmp_path / client, mark=mark, overwrite=True)
        monkeypatch.setattr(mark_places, "_MARKS", 200)
        first, second = trace_base(tmp_path / "b", MarkKey.read(tmp_path / "key.json"))
        # Keys are drawn anew: the correlation of equal choices is 1 to the last digit, not always in it.
        assert first.client == "b" and first.correlation == pytest.approx(1.0, abs=1e-12)
        assert first.false_alarm < 1e-6 < second.false_alarm
