# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A merge into the base is what clients see, and tells how far the base is from the full model."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel

from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.load import load_base
from fedlpp_hf.merge.merge import merge_adapter
from tests.helpers import make_pair, save_adapter


def test_an_untied_head_of_the_base_is_the_bases(tmp_path):
    full, adapter, model_class = make_pair(tmp_path, "gemma", target_modules=["lm_head", "q_proj"])
    export_base(full, tmp_path / "base", bits=4, embedding_bits=2, model_class=model_class)
    merge_adapter(full, adapter, tmp_path / "seen", base_dir=tmp_path / "base", base_weight=1.0, verify=True)
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
    seen = merge_adapter(full, adapter, tmp_path / "seen", base_dir=tmp_path / "base", base_weight=1.0, verify=True)
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_between_the_two(tmp_path, dtype):
    """W − λE + ΔW for every weight that the base has quantized, with an adapter on it or not."""
    full, adapter, model_class = make_pair(tmp_path, "llama")
    model_class.from_pretrained(full, dtype=getattr(torch, dtype)).save_pretrained(full)
    export_base(full, tmp_path / "base", bits=3, model_class=model_class)
    for weight in (0.0, 0.25, 1.0):
        report = merge_adapter(
            full, adapter, tmp_path / str(weight), base_dir=tmp_path / "base", base_weight=weight, verify=True
        )
        assert report.base_weight == weight
    at_w, between, at_base = (
        model_class.from_pretrained(tmp_path / str(weight)).state_dict() for weight in (0.0, 0.25, 1.0)
    )
    moved = [name for name in at_w if not torch.equal(at_w[name], at_base[name])]
    assert "model.embed_tokens.weight" in moved and "model.norm.weight" not in moved
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.02, "atol": 1e-3}
    for name, value in between.items():
        expected = at_w[name].float() + 0.25 * (at_base[name].float() - at_w[name].float())
        torch.testing.assert_close(value.float(), expected, **tolerance)


def _bert(name, **sizes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2} | sizes
    return getattr(transformers, name)(transformers.BertConfig(vocab_size=64, num_labels=3, **sizes))


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_base_of_the_backbone_or_with_another_head(tmp_path, name):
    """`fedlpp-hf quantize` without --model_class, as the checkpoint's configuration names the class."""
    _bert(name).save_pretrained(tmp_path / "full")
    export_base(tmp_path / "full", tmp_path / "base")
    classifier = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "full", num_labels=3)
    lora = LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS")
    save_adapter(classifier, lora, tmp_path / "adapter")
    arguments = (tmp_path / "full", tmp_path / "adapter")
    report = merge_adapter(*arguments, tmp_path / "out", base_dir=tmp_path / "base", verify=True)
    assert len(report.layers) == 4 and all(layer.ratio for layer in report.layers)
    merge_adapter(*arguments, tmp_path / "seen", base_dir=tmp_path / "base", base_weight=1.0, verify=True)
    if name == "BertForMaskedLM":  # it has no pooler
        with pytest.raises(ValueError, match="pooler.*model_class=BertForSequenceClassification"):
            load_base(tmp_path / "base", transformers.BertForSequenceClassification, num_labels=3)
        return
    client = load_base(tmp_path / "base", transformers.BertForSequenceClassification, num_labels=3)
    client = PeftModel.from_pretrained(client, tmp_path / "adapter").eval()
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "seen").eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, client(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 3}, {"intermediate_size": 64}])
@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_base_of_another_model_is_refused(tmp_path, name, sizes):
    model = _bert("BertForSequenceClassification")
    model.save_pretrained(tmp_path / "full")
    save_adapter(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"), tmp_path / "adapter")
    _bert(name, **sizes).save_pretrained(tmp_path / "other")
    export_base(tmp_path / "other", tmp_path / "base")
    with pytest.raises(ValueError, match="of another model"):
        merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out", base_dir=tmp_path / "base")
