# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""FedProx: a pull of a client's run towards what it started from."""

from collections.abc import Mapping

import torch


@torch.no_grad()
def add_proximal_gradient_(
    parameters: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], mu: float
) -> None:
    """Add μ(θ − proxy), the gradient of FedProx's term μ/2·‖θ − proxy‖² (arXiv 1812.06127, §3.2), to live gradients.

    Call it before the optimizer's step (`on_pre_optimizer_step`: after the Trainer has clipped the loss's gradient).
    Parameters without a gradient are not trained and stay so.
    """
    for key, parameter in parameters.items():
        if parameter.grad is not None:
            parameter.grad.add_(parameter - start[key].to(parameter), alpha=mu)
