# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A client's settings, and the bases on which it does not train."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from fedlpp_hf.base.export import export_base
from fedlpp_hf.flower.client_settings import ClientSettings
from fedlpp_hf.flower.client_trainer import make_client_trainer, train_task


class TestClientSettings:
    def test_round_trip(self, settings):
        assert ClientSettings.read(settings.write()) == settings

    def test_damaged_file(self, tmp_path):
        (tmp_path / "client.json").write_text("{}")
        with pytest.raises(ValueError, match=r"client\.json.*can't be read"):
            ClientSettings.read(tmp_path / "client.json")


class TestRejectedBases:
    def test_damaged_base_is_not_trained_on(self, llama_base, settings, tmp_path):
        base = Path(shutil.copytree(llama_base, tmp_path / "base"))
        weights = base / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        (tmp_path / "rows.jsonl").write_text('{"input_ids": [1, 2], "labels": [1, 2]}\n')
        config = tmp_path / "federation.yaml"
        config.write_text(f"trainer: {Path(__file__).with_name('flower_task.py')}:make_trainer\n")
        settings = replace(settings, config=str(config), data=str(tmp_path / "rows.jsonl"))
        with pytest.raises(ValueError, match=r"model\.safetensors` is not the exported file"):
            make_client_trainer(settings, base)

    def test_base_that_changed_in_memory_is_not_trained_on(self):
        def prove_base_unmoved():
            raise RuntimeError("The base differs")

        trainer = SimpleNamespace(guard=SimpleNamespace(prove_base_unmoved=prove_base_unmoved))
        with pytest.raises(RuntimeError, match="The base differs"):
            train_task(trainer, b"task")

    def test_base_with_full_precision_linears_is_refused(self, settings, full_llama, tmp_path):
        export_base(full_llama, tmp_path / "base-32", embedding_bits=32, model_class=AutoModelForCausalLM)
        with pytest.raises(ValueError, match=r"1 linear layers in full precision \(lm_head\.weight\)"):
            make_client_trainer(settings, tmp_path / "base-32")
