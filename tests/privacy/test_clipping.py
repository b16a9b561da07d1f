# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The bound on an update's norm is the same on both sides."""

import pytest
import torch

from fedlpp_hf.privacy.clipping import check_norm, clip_update
from fedlpp_hf.tensors.adapters import global_norm


def make_update() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(3, size, generator=generator) for key, size in (("a", 5), ("b", 1), ("c", 9))}


def test_clipping_and_its_check_agree():
    update = make_update()
    norm = global_norm(update)
    flat = torch.cat([tensor.flatten().double() for tensor in update.values()])
    assert norm == pytest.approx(float(flat.norm()))
    clipped, had = clip_update(update, norm / 3)
    assert had == norm and global_norm(clipped) == pytest.approx(norm / 3)
    check_norm(clipped, norm / 2)
    with pytest.raises(ValueError, match="at most"):
        check_norm(update, norm / 2)
    with pytest.raises(ValueError, match="at most"):
        check_norm({"w": torch.tensor([float("nan")])}, 1.0)
    same, _ = clip_update(update, 2 * norm)
    assert all(torch.equal(same[key], update[key]) for key in update)


def test_bound_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="max_norm=0.0; expected a positive number"):
        clip_update(make_update(), 0.0)
