# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Memory for speed: the base's weights as floats while a client trains, instead of from their codes at every product."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn


@contextmanager
def hold_dequantized_(model: nn.Module) -> Iterator[None]:
    """Within the block, bitsandbytes' 4-bit layers multiply by weights that were dequantized once.

    Every weight takes the memory of its layer's compute dtype, in addition to its codes, and again that of the full
    model's dtype where it is another one: bitsandbytes rounds the weights to that dtype in the backward pass and not in
    the forward pass. On a CPU, products and gradients are the same to the bit. Codes must not change in the block.

    Raises:
        ValueError: for a layer without a compute dtype, or whose weight is not stored `(out, in)`.
    """
    with ExitStack() as stack:
        for name, layer in model.named_modules():
            if isinstance(layer, Linear4bit):
                held = _make_forward(name, layer)
                stack.callback(_restore_forward_, layer, vars(layer).get("forward"))
                layer.forward = held
        yield


def _restore_forward_(layer: Linear4bit, before: Callable | None) -> None:
    del layer.forward
    if before is not None:  # accelerate's hooks, and a block around this one, put theirs there
        layer.forward = before


def _make_forward(name: str, layer: Linear4bit) -> Callable[[torch.Tensor], torch.Tensor]:
    state, dtype = layer.weight.quant_state, layer.compute_dtype
    if dtype is None:
        raise ValueError(
            f"`{name}` has no compute dtype; load the base by `load_base`, or set bnb_4bit_compute_dtype."
        )
    if tuple(state.shape) != (layer.out_features, layer.in_features):
        raise ValueError(
            f"`{name}` was quantized in the shape {tuple(state.shape)}; expected {layer.out_features} outputs by "
            f"{layer.in_features} inputs. Export the base again."
        )
    with torch.no_grad():
        as_computed = copy.copy(state)
        as_computed.dtype = dtype
        weight = dequantize_4bit(layer.weight.data, as_computed)
        backward_weight = weight if state.dtype == dtype else dequantize_4bit(layer.weight.data, state)

    def forward(x: torch.Tensor) -> torch.Tensor:
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return _Product.apply(x.to(dtype), weight, backward_weight, bias).to(x.dtype)

    return forward


class _Product(torch.autograd.Function):
    """The arithmetic of bitsandbytes' `MatMul4Bit`, without the codes."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, backward_weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = backward_weight
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None]:
        (gradient,) = gradients
        by_x = gradient @ ctx.weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return by_x, None, None, gradient.sum(0) if ctx.needs_input_grad[3] else None
