# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The span of a gradient's rows is told from noise, up to the rank, and Adam's first step is undone."""

import pytest
import torch

from fedlpp_hf.audit.spans import find_row_space, measure_distance, undo_adam


def make_gradient(inputs: int, outputs: int = 40, columns: int = 32, seed: int = 0):
    """Σ δ xᵀ of some inputs, and 200 candidates of which the first are those inputs."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randn(200, columns, generator=generator)
    return torch.randn(outputs, inputs, generator=generator) @ candidates[:inputs], candidates


def test_inputs_lie_in_the_span_and_no_others_do():
    gradient, candidates = make_gradient(10)
    space = find_row_space(gradient, torch.full_like(gradient, 1e-6))
    distances = measure_distance(candidates, space)
    assert len(space.basis) == 10 and not space.full
    assert distances[:10].max() < 1e-2 and distances[10:].min() > 0.3


@pytest.mark.parametrize("inputs", [32, 50])
def test_as_many_inputs_as_columns_leave_nothing_to_tell(inputs):
    gradient, candidates = make_gradient(inputs, outputs=60)
    space = find_row_space(gradient, torch.full_like(gradient, 1e-6))
    assert space.full and measure_distance(candidates, space).max() < 1e-2


def test_noise_alone_has_no_span():
    noise = torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    assert len(find_row_space(noise, torch.ones_like(noise)).basis) == 0
    exact = torch.zeros(4, 8)
    assert len(find_row_space(exact, exact).basis) == 0


def test_a_row_s_noise_may_be_large_where_others_are_exact():
    """Rows are divided by their own noise, so that a few bad ones spoil nothing."""
    gradient, candidates = make_gradient(5)
    noise = torch.full_like(gradient, 1e-6)
    noise[:10] = 1.0
    seen = gradient + noise * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2))
    distances = measure_distance(candidates, find_row_space(seen, noise))
    assert distances[:5].max() < 1e-2 < 0.3 < distances[5:].min()


@pytest.mark.parametrize(("size", "error"), [(1e-5, 1e-3), (1e-3, 0.05)])
def test_the_first_step_of_adam_is_undone_by_its_epsilon(size, error):
    gradient = size * torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    factor = torch.nn.Parameter(torch.zeros_like(gradient))
    factor.grad = gradient.clone()
    torch.optim.AdamW([factor], lr=1e-3).step()
    found, noise = undo_adam(factor.detach(), factor.detach(), 1e-3)
    assert ((found - gradient).norm() / gradient.norm()).item() < error
    assert ((found - gradient).abs() <= 6 * noise + 1e-6 * gradient.abs()).all()
    # A second step's direction has no such scale left: what comes back is not the gradient.
    assert (
        (undo_adam(2 * factor.detach(), factor.detach(), 1e-3)[0] - gradient).norm() / gradient.norm()
    ).item() > 0.5
