# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Moments of a model's inputs, and the base that is rounded by them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedlpp_hf.base.calibration import measure_moments
from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.load import load_base
from fedlpp_hf.base.manifest import base_fingerprint, read_manifest
from fedlpp_hf.base.packing import pack_base, unpack_base
from fedlpp_hf.privacy.marks import Mark
from fedlpp_hf.report.base_inspection import describe_base
from tests.helpers import SMALL_MODELS, read_files


def load_full(full_model, name):
    return SMALL_MODELS[name][0].from_pretrained(full_model(name)).eval()


def make_batches(count=3):
    """Batches with padding, whose ids are not the zero that padding has."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, 60, (4, 12), generator=generator)
        mask = torch.arange(12) < torch.randint(6, 13, (4, 1), generator=generator)
        batches.append({"input_ids": ids * mask, "attention_mask": mask.long()})
    return batches


def run(model, batches):
    return lambda: [model(**batch) for batch in batches]


def calibrate(model, batches, directory, **options):
    return measure_moments(model, run(model, batches), 4 * len(batches), directory, **options)


@pytest.mark.parametrize(
    "name, module", [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.0.attn.c_attn")]
)
def test_moments_are_those_of_the_inputs_without_padding(name, module, full_model, tmp_path):
    model, batches = load_full(full_model, name), make_batches()
    inputs = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        run(model, batches)()
    hook.remove()
    rows = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(inputs, batches, strict=True)])
    calibration = calibrate(model, batches, tmp_path / "moments")
    torch.testing.assert_close(calibration.read(module), rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert calibration.rows == 12 and calibration.read("elsewhere") is None


def test_an_adapter_and_several_passes_change_nothing(full_model, tmp_path):
    model, batches = load_full(full_model, "llama"), make_batches()
    whole = calibrate(model, batches, tmp_path / "whole")
    calls = []
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    parts = measure_moments(
        adapted, lambda: calls.append(run(adapted, batches)()), 12, tmp_path / "parts", pass_bytes=40_000
    )
    assert len(calls) > 2 and parts.files.keys() == whole.files.keys()
    for name in whole.files:
        assert torch.equal(parts.read(name), whole.read(name)), name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_calibrated_base_answers_more_like_the_full_model(name, full_model, base, tmp_path):
    model, batches = load_full(full_model, name), make_batches(16)
    calibration = calibrate(model, batches, tmp_path / "moments")
    export_base(full_model(name), tmp_path / "base", bits=3, calibration=calibration)
    export_base(full_model(name), tmp_path / "again", bits=3, calibration=calibration)
    assert read_files(tmp_path / "base") == read_files(tmp_path / "again")
    plain = base(name, bits=3)
    assert base_fingerprint(tmp_path / "base") != base_fingerprint(plain)
    manifest = read_manifest(tmp_path / "base")
    assert manifest["calibration"] == {"rows": 64, "not_reached": []} and "calibration" not in read_manifest(plain)
    assert "Calibrated on 64 rows of the owner." in describe_base(tmp_path / "base", verify=True)

    @torch.no_grad()
    def distance(directory):
        held = load_base(directory).eval()
        return sum((held(**batch).logits - model(**batch).logits).square().sum() for batch in batches)

    assert distance(tmp_path / "base") < 0.9 * distance(plain)


def test_modules_that_no_row_reaches_are_rounded_to_the_nearest_and_listed(full_model, base, tmp_path):
    model, batches = load_full(full_model, "llama"), make_batches()
    left_out = "model.layers.1.mlp.down_proj"
    calibration = calibrate(model, batches, tmp_path / "moments")
    del calibration.files[left_out]
    export_base(full_model("llama"), tmp_path / "base", bits=3, calibration=calibration)
    assert read_manifest(tmp_path / "base")["calibration"]["not_reached"] == [f"{left_out}.weight"]
    assert any(f"rounded to the nearest: {left_out}.weight" in line for line in describe_base(tmp_path / "base"))
    made, plain = load_base(tmp_path / "base").state_dict(), load_base(base("llama", bits=3)).state_dict()
    assert torch.equal(made[f"{left_out}.weight"], plain[f"{left_out}.weight"])
    other = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(made[other], plain[other])


def test_a_calibrated_base_of_sixteen_bits_is_packed_without_loss(full_model, tmp_path):
    model, batches = load_full(full_model, "llama"), make_batches()
    calibration = calibrate(model, batches, tmp_path / "moments")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "full")
    export_base(tmp_path / "full", tmp_path / "base", bits=2, calibration=calibration)
    pack_base(tmp_path / "base", tmp_path / "base.packed")
    unpack_base(tmp_path / "base.packed", tmp_path / "unpacked")
    assert read_files(tmp_path / "base") == read_files(tmp_path / "unpacked")


def test_rows_that_reach_nothing_are_refused(full_model, tmp_path):
    with pytest.raises(ValueError, match="None of 5 calibration rows reached a Linear"):
        measure_moments(load_full(full_model, "llama"), lambda: None, 5, tmp_path)


@pytest.mark.parametrize(
    "options, given", [({"bits": 8}, "bits=8"), ({"bits": 4, "mark": Mark(b"key", "client")}, "a mark")]
)
def test_what_does_not_go_with_a_calibration_is_refused(options, given, full_model, tmp_path):
    model = load_full(full_model, "llama")
    calibration = calibrate(model, make_batches(1), tmp_path / "moments")
    with pytest.raises(ValueError, match=f"A calibration with {given}"):
        export_base(full_model("llama"), tmp_path / "base", calibration=calibration, **options)
