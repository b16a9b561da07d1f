# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the factors of one update say about the inputs of their layer: the space that those inputs span. Pure functions.

The gradient of a linear layer is a sum over tokens, dW = Σ δ xᵀ, so its rows lie in the span of the inputs x (DAGER, arXiv
2405.15586, §4.1). For LoRA's y = Wx + s·B·A·x that makes two sums: dA = s Σ (Bᵀδ) xᵀ, whose rows lie in the span of the x, and
dB = s Σ δ (Ax)ᵀ, whose rows lie in the span of the Ax. In the first round B is zero, and so is dA. What a test can tell ends
with the rank r: n inputs are told from others by dB if n < r, and by dA of m layers with the same input if n ≤ m·r.
"""

from dataclasses import dataclass

import torch


_ROUNDING = 2.0**-24  # of float32, relative
_OPERATIONS = 8.0  # how many times that an optimizer's step and the sums before it lose
_EDGE = 1.1  # above the largest singular value of noise, which is no sharp edge in small matrices
ADAM_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class RowSpace:
    """The span of a matrix's rows, as far as it stands out of the noise.

    `basis` `(k, columns)` is orthonormal. It is `full` where k is the most that the matrix can have: then there may have been more
    inputs than it tells, and one of them need not lie in it.
    """

    basis: torch.Tensor
    full: bool


def find_row_space(matrix: torch.Tensor, noise: torch.Tensor) -> RowSpace:
    """The space of the rows of `matrix` `(rows, columns)` whose values have errors of standard deviation `noise`, in its shape.

    A row may be scaled without leaving the space, so each is divided by its own noise. Then noise alone has singular values up to
    √rows + √columns (Marchenko and Pastur), and directions above it are kept.
    """
    spread = noise.double().square().mean(1).sqrt()
    known = spread > 0
    if not bool(known.any()):
        return RowSpace(matrix.new_zeros(0, matrix.shape[1]), False)
    scaled = matrix.double()[known] / spread[known, None]
    _, values, basis = torch.linalg.svd(scaled, full_matrices=False)
    edge = _EDGE * (scaled.shape[0] ** 0.5 + scaled.shape[1] ** 0.5)
    count = int((values > edge).sum())
    return RowSpace(basis[:count].float(), count == min(scaled.shape))


def measure_distance(candidates: torch.Tensor, space: RowSpace) -> torch.Tensor:
    """How far `candidates` `(…, columns)` are from the space, as a share of their length: 0 inside, 1 at a right angle."""
    lengths = candidates.square().sum(-1).clamp(min=torch.finfo(candidates.dtype).tiny)
    inside = (candidates @ space.basis.T.to(candidates)).square().sum(-1)
    # 1 − share loses what is below √ε of float32, far under any noise that matters here.
    return (1 - inside / lengths).clamp(min=0).sqrt()


def rounding_noise(delta: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The standard deviation of each value of Δ = `end` − start in float32: that of the factor's value, and of its row's sums."""
    largest = delta.abs().amax(1, keepdim=True)
    return _ROUNDING * (end.abs() + _OPERATIONS * largest).expand(delta.shape)


def undo_adam(delta: torch.Tensor, end: torch.Tensor, learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient behind one first step of Adam, Δ = −lr·g / (|g| + ε), and its noise.

    The step is nearly the gradient's sign. But ε is not zero: |g| = ε·u / (1 − u) with u = |Δ| / lr. Where the factor started at
    zero, float32 holds 1 − u to some 2⁻²⁴, so that a gradient of 10⁻⁴ comes back to a few per mille, and one of 10⁻² to a tenth.

    Args:
        delta: Δ of the factor.
        end: The factor after the step.
        learning_rate: Of the step.
    """
    share = (delta.double() / learning_rate).abs()
    error = _ROUNDING * (_OPERATIONS / 2 + end.double().abs() / learning_rate)
    left = torch.maximum(1 - share, error)
    gradient = -delta.double().sign() * ADAM_EPSILON * share / left
    return gradient.float(), (error * ADAM_EPSILON / left.square()).float()
