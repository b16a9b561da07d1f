# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A QLoRA adapter without any federation, as docs/merge.md merges it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedlpp_hf import export_base, merge_adapter
from fedlpp_hf.base.kernels import keep_layout_
from tests.helpers import build_model, randomize_


@pytest.mark.parametrize("double_quant", [False, True])
def test_base_weight_one_is_what_was_trained(tmp_path, double_quant):
    build_model("llama").save_pretrained(tmp_path / "full")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=quantization)
    trained = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomize_(trained)
    keep_layout_(trained)
    trained.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(2, 34).view(2, 16)
    with torch.no_grad():
        wanted = trained.eval()(input_ids=ids).logits

    export_base(tmp_path / "full", tmp_path / "base", bits=4, double_quant=double_quant, embedding_bits=32)
    differences = {}
    for weight in (0.0, 1.0):
        out = tmp_path / f"merged-{weight}"
        report = merge_adapter(
            tmp_path / "full", tmp_path / "adapter", out, base_dir=tmp_path / "base", base_weight=weight, verify=True
        )
        assert all(layer.error_norm > 0 for layer in report.layers)
        with torch.no_grad():
            found = AutoModelForCausalLM.from_pretrained(out).eval()(input_ids=ids).logits
        differences[weight] = float((found - wanted).norm() / wanted.norm())
    assert differences[1.0] < 1e-5 < 5e-4 < differences[0.0]
