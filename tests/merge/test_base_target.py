# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A merge into the base is what clients see, and tells how far the base is from the full model."""

import pytest
import torch
from peft import PeftModel

from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.load import load_base
from fedlpp_hf.merge.merge import merge_adapter
from tests.helpers import make_pair


def test_an_untied_head_of_the_base_is_the_bases(tmp_path):
    full, adapter, model_class = make_pair(tmp_path, "gemma", target_modules=["lm_head", "q_proj"])
    export_base(full, tmp_path / "base", bits=4, embedding_bits=2, model_class=model_class)
    merge_adapter(full, adapter, tmp_path / "seen", base_dir=tmp_path / "base", target="base", verify=True)
    client = PeftModel.from_pretrained(load_base(tmp_path / "base", model_class), adapter)
    ids = torch.arange(20)[None]
    merged = model_class.from_pretrained(tmp_path / "seen")
    torch.testing.assert_close(merged(ids).logits, client(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(("bits", "double_quant"), [(2, False), (4, True), (8, False)])
def test_merging_into_the_base_is_what_clients_see(tmp_path, architecture, bits, double_quant):
    full, adapter, model_class = make_pair(tmp_path, architecture)
    export_base(full, tmp_path / "base", bits=bits, double_quant=double_quant, model_class=model_class)
    report = merge_adapter(full, adapter, tmp_path / "out", base_dir=tmp_path / "base", verify=True)
    seen = merge_adapter(full, adapter, tmp_path / "seen", base_dir=tmp_path / "base", target="base", verify=True)
    ours, before = (model_class.from_pretrained(tmp_path / d).state_dict() for d in ("seen", "full"))
    assert [layer.ratio for layer in report.layers] == [layer.ratio for layer in seen.layers]
    updated = model_class.from_pretrained(tmp_path / "out").state_dict()
    for layer in report.layers:  # (W + ΔW) − (Q(W) + ΔW) = E
        error = (updated[layer.parameter] - ours[layer.parameter]).norm()
        torch.testing.assert_close(torch.tensor(layer.error_norm), error, rtol=1e-3, atol=1e-6)
        update = (updated[layer.parameter] - before[layer.parameter]).norm()
        torch.testing.assert_close(torch.tensor(layer.update_norm), update, rtol=1e-4, atol=1e-6)
        assert layer.ratio > 0
    if bits < 8:  # int8 computes otherwise on a CPU
        client = PeftModel.from_pretrained(load_base(tmp_path / "base", model_class), adapter)
        ids = torch.arange(20)[None]
        merged = model_class.from_pretrained(tmp_path / "seen")
        torch.testing.assert_close(merged(ids).logits, client(ids).logits, rtol=1e-3, atol=1e-3)
