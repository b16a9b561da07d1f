# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Small adapters and their dense products in float64, which the rules of aggregation are compared with."""

import torch
from peft import LoraConfig

from fedlpp_hf.aggregation.products import join_residual
from fedlpp_hf.aggregation.round import RoundUpdates
from fedlpp_hf.tensors.lora import lora_factors
from fedlpp_hf.tensors.quantization import dequantize, quantize


Q = "base_model.model.q.{}.weight"
E = "base_model.model.embed.{}"
C = "base_model.model.conv.{}.weight"
HEAD = "base_model.model.head.weight"


def make_adapter(seed: int, rank: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    """A linear, an embedding and a convolution, and a tensor outside LoRA; the linear's output is smaller than the rank."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        Q.format("lora_A"): (rank, 20),
        Q.format("lora_B"): (14, rank),
        Q.format("lora_A").replace(".q.", ".classifier."): (rank, 20),
        Q.format("lora_B").replace(".q.", ".classifier."): (3, rank),
        E.format("lora_embedding_A"): (rank, 30),
        E.format("lora_embedding_B"): (16, rank),
        C.format("lora_A"): (rank, 5, 3, 3),
        C.format("lora_B"): (12, rank, 1, 1),
        HEAD: (3, 7),
    }
    return {key: size * torch.randn(shape, generator=g) for key, shape in shapes.items()}


def make_config(rank: int, alpha: int = 16, rslora: bool = False, **kwargs) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["q"], **kwargs)


def make_round(deltas, weights=None, adapter=None, start=None, config=None, **changes) -> RoundUpdates:
    """A round of `deltas` with equal weights, taken at `start`, which is the server's adapter if it is not given."""
    adapter = deltas[0] if adapter is None else adapter
    return RoundUpdates(
        deltas=deltas,
        weights=[1.0] * len(deltas) if weights is None else weights,
        start=adapter if start is None else start,
        adapter=adapter,
        peft_config=config or make_config(1),
        **changes,
    )


def dense(tensors, config) -> dict[str, torch.Tensor]:
    """ΔW of every target, and the tensors outside LoRA, float64."""
    products = {
        module: t.scale * (tensors[t.key_b].double().flatten(1) @ tensors[t.key_a].double().flatten(1))
        for module, t in lora_factors(tensors, config).items()
    }
    return products | {HEAD: tensors[HEAD].double()}


def add(first, second):
    return {key: tensor + second.get(key, 0) for key, tensor in first.items()}


def coarse(adapter):
    return {key: dequantize(quantize(tensor, 3, 64)) for key, tensor in adapter.items()}


def total(adapter, residual, config):
    """What the server stands for: its adapter and its residual."""
    return dense(*join_residual(adapter, residual, config))


def assert_close(first, second, tolerance=1e-4):
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=tolerance, atol=tolerance)
