# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Quantized checkpoints are refused, whichever way they say what they are: codes without their scale are not weights."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from fedlpp_hf.base.export import export_base
from fedlpp_hf.merge.merge import check_merge, merge_adapter
from tests.helpers import save_adapter


_WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def _quantize(directory, scale: str | None, dtype=torch.float8_e4m3fn) -> None:
    """Store one weight as codes, with a scale under a name."""
    tensors = load_file(directory / "model.safetensors")
    factor = tensors[_WEIGHT].abs().max() / 100
    tensors[_WEIGHT] = (tensors[_WEIGHT] / factor).to(dtype)
    if scale:
        tensors[scale] = factor.reshape(1)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _configure(directory, values, file: str = "config.json") -> None:
    path = directory / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


@pytest.fixture
def adapter(copied, tmp_path):
    save_adapter(LlamaForCausalLM.from_pretrained(copied), LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def _check_refused(full, adapter, directory, message: str) -> None:
    for act in (
        lambda: export_base(full, directory / "base"),
        lambda: merge_adapter(full, adapter, directory / "out"),
        lambda: check_merge(full, adapter),
    ):
        with pytest.raises(ValueError, match=message):
            act()
    assert {path.name for path in directory.iterdir()} == {"full", "adapter"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize(
    "scale",
    [
        f"{_WEIGHT}_scale",
        f"{_WEIGHT}_scale_inv",
        f"{_WEIGHT}.absmax",
        "model.layers.0.self_attn.q_proj.SCB",
        "model.layers.0.self_attn.q_proj.s",
        "quantization.scales",
    ],
)
def test_scales_beside_codes(copied, adapter, tmp_path, scale, dtype):
    _quantize(copied, scale, dtype)
    _check_refused(copied, adapter, tmp_path, f"`{_WEIGHT}` is stored as .* with `{scale}` beside it")


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("quantization_config", "config.json"),
        ("compression_config", "config.json"),
        ("quantization", "config.json"),
        ("text_config", "config.json"),  # and in it quantization_config
        ("hf_quant_config.json", "hf_quant_config.json"),
        ("quantize_config.json", "quantize_config.json"),
    ],
)
def test_configurations_that_tell(copied, adapter, tmp_path, key, file):
    values = {"quant_method": "fp8", "bits": 8}
    _configure(copied, {key: {"quantization_config": values} if key == "text_config" else values}, file)
    named = "quantization_config" if key == "text_config" else key
    _check_refused(copied, adapter, tmp_path, f"is quantized already .it has `{named}`")


def test_float8_without_a_scale_is_a_container(copied, adapter, tmp_path):
    _quantize(copied, None)
    merge_adapter(copied, adapter, tmp_path / "out", verify=True)
    assert load_file(tmp_path / "out" / "model.safetensors")[_WEIGHT].dtype == torch.float8_e4m3fn


def test_other_tensors_without_a_place_do_not_matter(copied, adapter, tmp_path):
    tensors = load_file(copied / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.layers.0.mlp.scale": torch.ones(1)}
    save_file(tensors | extra, copied / "model.safetensors", {"format": "pt"})
    merge_adapter(copied, adapter, tmp_path / "out", verify=True)
    export_base(copied, tmp_path / "base")
