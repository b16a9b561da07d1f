# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Several adapters are merged as the exact mean of their products."""

import shutil

import pytest
import torch

from fedlpp_hf.merge.merge import merge_adapter
from tests.helpers import make_others, make_pair, merge_with_peft


def test_adapters_of_other_ranks_and_scales_are_averaged(tmp_path):
    full, first, model_class = make_pair(tmp_path)
    shutil.copytree(full, tmp_path / "b" / "full")
    _, second, _ = make_pair(tmp_path / "b", r=2, lora_alpha=7, use_rslora=True)
    merge_adapter(full, [first, second], tmp_path / "out", weights=[3, 1])
    result = model_class.from_pretrained(tmp_path / "out").state_dict()
    singles = [merge_with_peft(full, adapter, model_class) for adapter in (first, second)]
    for name, tensor in result.items():
        mean = 0.75 * singles[0][name].double() + 0.25 * singles[1][name].double()
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-6)
    _, other, _ = make_pair(tmp_path / "c", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="v_proj.*same targets"):
        merge_adapter(full, [first, other], tmp_path / "bad")


def test_several_adapters_are_averaged_as_products(tmp_path):
    full, _, model_class = make_pair(tmp_path)
    others, shares = make_others(tmp_path, full, 3), [0.5, 0.2, 0.3]
    merge_adapter(full, others, tmp_path / "out", weights=[5, 2, 3], verify=True)
    result = model_class.from_pretrained(tmp_path / "out").state_dict()
    singles = [merge_with_peft(full, other, model_class) for other in others]
    for name, tensor in result.items():
        mean = sum(share * single[name].double() for share, single in zip(shares, singles, strict=True))
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="2 weights for 3"):
        merge_adapter(full, others, tmp_path / "bad", weights=[1, 2])
    with pytest.raises(ValueError, match="not negative"):
        merge_adapter(full, others, tmp_path / "bad", weights=[1, 2, -1])
