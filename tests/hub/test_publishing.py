# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a federated trainer pushes: the server's adapter, or the merged model, and never a client's view."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers import make_rows, make_trainer


def logits_of(model):
    rows = make_rows(4).remove_columns("client").with_format("torch")[:]
    with torch.no_grad():
        return model.eval()(**rows).logits


def test_push_adapter_and_merged_model(full_llama, lora, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # for the owner's process
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    trainer = make_trainer(
        str(full_llama), tmp_path / "out", lora, num_rounds=1, hub_model_id="owner/adapter", hub_token="writer"
    )
    trainer.train()
    trainer.push_to_hub()
    names = set(hub.files("owner/adapter"))
    assert names - {".gitattributes"} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    pushed = hub.files("owner/adapter")["adapter_model.safetensors"].data
    assert pushed == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert trainer.merge_and_push("owner/merged")
    full = AutoModelForCausalLM.from_pretrained(full_llama)
    expected = logits_of(PeftModel.from_pretrained(full, tmp_path / "out"))
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained("owner/merged")), expected, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="allow_public"):
        trainer.push_to_hub(private=False)
    with pytest.raises(ValueError, match="blocking"):
        trainer.push_to_hub(blocking=False)
