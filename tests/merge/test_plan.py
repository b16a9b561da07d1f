# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a merge changes besides the weights that LoRA targets: tied weights, heads, and what it leaves to PEFT."""

import shutil

import pytest
import torch
import transformers
from peft import PeftModel

from fedlpp_hf.merge import through_peft
from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.tensors.adapters import read_adapter
from tests.helpers import ARCHITECTURES, assert_equal_states, build_model, make_pair, merge_with_peft


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "q_proj"]])
def test_tied_weights_are_untied_when_only_one_is_changed(tmp_path, targets):
    full, adapter, model_class = make_pair(tmp_path, "gemma", target_modules=targets)
    report = merge_adapter(full, adapter, tmp_path / "out", verify=True)
    merged = model_class.from_pretrained(tmp_path / "out")
    assert not merged.config.tie_word_embeddings and report.added == ["lm_head.weight"]
    # Not PEFT's merge, which changes both; but what PEFT's model computes before it.
    expected = PeftModel.from_pretrained(model_class.from_pretrained(full), adapter)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_shared_weight_that_can_not_be_untied_is_an_error(tmp_path):
    full, adapter, _ = make_pair(tmp_path, "t5", target_modules=["lm_head"])
    with pytest.raises(ValueError, match="lm_head.*shares"):
        merge_adapter(full, adapter, tmp_path / "out")


def test_a_head_that_the_full_model_lacks_is_added(tmp_path):
    full, adapter, model_class = make_pair(tmp_path, "bert")
    model = build_model("bert")
    model.bert.save_pretrained(tmp_path / "encoder")  # keys without a prefix, two labels, no head
    report = merge_adapter(tmp_path / "encoder", adapter, tmp_path / "out", verify=True)
    result, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(report.added) == {"classifier.weight", "classifier.bias"} and not info["missing_keys"]
    assert_equal_states(result.state_dict(), merge_with_peft(full, adapter, model_class))
    assert result.config.num_labels == 3


def test_a_head_of_another_size_is_replaced(tmp_path):
    _, adapter, model_class = make_pair(tmp_path, "bert")
    name, values, _, _ = ARCHITECTURES["bert"]
    config = transformers.BertConfig(**values | {"num_labels": 5})
    other = getattr(transformers, name)(config)
    other.save_pretrained(tmp_path / "five")
    report = merge_adapter(tmp_path / "five", adapter, tmp_path / "out", verify=True)
    result = model_class.from_pretrained(tmp_path / "out")
    tensors, _ = read_adapter(adapter)
    assert torch.equal(result.classifier.weight, tensors["base_model.model.classifier.weight"])
    assert result.config.num_labels == 3 and set(report.replaced) == {"classifier.weight", "classifier.bias"}


def test_what_is_more_than_a_product_goes_through_peft(tmp_path, monkeypatch):
    full, adapter, model_class = make_pair(tmp_path, "llama", trainable_token_indices=[1, 5])
    warned = []
    monkeypatch.setattr(through_peft.logger, "warning", warned.append)
    report = merge_adapter(full, adapter, tmp_path / "out", verify=True)
    assert "trainable_token_indices" in report.through_peft and not report.verified
    assert any("PEFT, because" in line and "GB, is held in memory" in line for line in warned)
    result = model_class.from_pretrained(tmp_path / "out").state_dict()
    assert_equal_states(result, merge_with_peft(full, adapter, model_class))
    with pytest.raises(ValueError, match="one adapter"):
        merge_adapter(full, [adapter, adapter], tmp_path / "mean")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="needs .* GB"):
        merge_adapter(full, adapter, tmp_path / "no room")
