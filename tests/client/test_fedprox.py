# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""FedProx's pull is the gradient of its term."""

import torch

from fedlpp_hf.client.fedprox import add_proximal_gradient_


def test_proximal_gradient_is_that_of_the_term():
    start = {"w": torch.randn(5), "frozen": torch.randn(2)}
    w = torch.nn.Parameter(torch.randn(5))
    frozen = torch.nn.Parameter(torch.randn(2))
    (w.square().sum() + 0.3 / 2 * (w - start["w"]).square().sum()).backward()
    expected, w.grad = w.grad, None
    w.square().sum().backward()
    add_proximal_gradient_({"w": w, "frozen": frozen}, start, 0.3)
    torch.testing.assert_close(w.grad, expected)
    assert frozen.grad is None
