# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a client may add to its local run or to its update: FedProx's term, SCAFFOLD's correction, clipping."""

import math
from collections.abc import Mapping

import torch


Tensors = Mapping[str, torch.Tensor]


@torch.no_grad()
def add_proximal_gradient_(parameters: Tensors, start: Tensors, mu: float) -> None:
    """Add μ(θ − proxy), the gradient of FedProx's term μ/2·‖θ − proxy‖² (arXiv 1812.06127, §3.2), to live gradients.

    Call it before the optimizer's step (`on_pre_optimizer_step`: after the Trainer has clipped the loss's gradient).
    Parameters without a gradient are not trained and stay so.
    """
    for key, parameter in parameters.items():
        if parameter.grad is not None:
            parameter.grad.add_(parameter - start[key].to(parameter), alpha=mu)


@torch.no_grad()
def add_control_gradient_(parameters: Tensors, server_control: Tensors, client_control: Tensors) -> None:
    """Add SCAFFOLD's c − c_i (arXiv 1910.06378, algorithm 1) to live gradients; an absent control is zero.

    The correction is one of plain SGD's steps: an adaptive optimizer rescales it, and what it corrects is no longer drift.
    """
    for key, parameter in parameters.items():
        if parameter.grad is not None:
            for controls, sign in ((server_control, 1), (client_control, -1)):
                if key in controls:
                    parameter.grad.add_(controls[key].to(parameter), alpha=sign)


def update_client_control(
    client_control: Tensors, server_control: Tensors, delta: Tensors, steps: int, learning_rate: float
) -> dict[str, torch.Tensor]:
    """A client's control after its run: c_i − c − Δ_i/(steps·lr), option II of SCAFFOLD. It stays at the client.

    Raises:
        ValueError: if the run had no steps or no learning rate.
    """
    if steps < 1 or not learning_rate > 0:
        raise ValueError(f"steps={steps}, learning_rate={learning_rate}; expected a run that has trained.")
    return {
        key: client_control.get(key, 0.0) - server_control.get(key, 0.0) - change / (steps * learning_rate)
        for key, change in delta.items()
    }


def update_server_control(
    server_control: Tensors, delta_mean: Tensors, steps: int, learning_rate: float, share_of_clients: float
) -> dict[str, torch.Tensor]:
    """The server's control after a round: c + |S|/N·mean(c_i⁺ − c_i), from what the server has anyway.

    Option II makes c_i⁺ − c_i = −c − Δ_i/(steps·lr), so that the uniform mean of Δ_i is all that is needed: no control goes
    up, no client's control is at the server. All clients of the round took `steps` steps.
    """
    if steps < 1 or not learning_rate > 0 or not 0 < share_of_clients <= 1:
        raise ValueError(
            f"steps={steps}, learning_rate={learning_rate}, share_of_clients={share_of_clients}; expected a run that has "
            "trained, and a share in (0, 1]."
        )
    return dict(server_control) | {
        key: server_control.get(key, torch.zeros_like(change)) * (1 - share_of_clients)
        - share_of_clients * change / (steps * learning_rate)
        for key, change in delta_mean.items()
    }


def update_norm(update: Tensors) -> float:
    """The Euclidean norm of all tensors of an update together."""
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in update.values()))


def clip_update(update: Tensors, max_norm: float) -> tuple[dict[str, torch.Tensor], float]:
    """`update` scaled down to the norm `max_norm` if it is longer, and the norm that it had.

    Raises:
        ValueError: if `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}; expected a positive number.")
    norm = update_norm(update)
    if norm <= max_norm:
        return dict(update), norm
    return {key: tensor * (max_norm / norm) for key, tensor in update.items()}, norm


def check_norm(update: Tensors, max_norm: float) -> None:
    """Refuse an update that is longer than the server accepts.

    Raises:
        ValueError: naming both norms.
    """
    norm = update_norm(update)
    if not norm <= max_norm:
        raise ValueError(f"its norm is {norm:.4g}; at most {max_norm:.4g} is accepted")
