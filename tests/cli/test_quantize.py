# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf quantize` makes the base that `export_base` makes."""

import json

from fedlpp_hf.base import export
from fedlpp_hf.base.manifest import read_manifest
from fedlpp_hf.cli.arguments import BITS, BLOCK_SIZES
from fedlpp_hf.report.text import format_bytes
from fedlpp_hf.tensors.codebooks import BITS as CODEBOOKS
from fedlpp_hf.tensors.codebooks import check_bits


def test_makes_the_base_that_the_function_makes(run, full_llama, llama_base, tmp_path):
    code, out, _ = run("quantize", full_llama, tmp_path / "base", "--model-class", "AutoModelForCausalLM")
    assert code == 0
    manifest = read_manifest(tmp_path / "base")
    assert manifest["fingerprint"] == read_manifest(llama_base)["fingerprint"]
    assert f"Each client is sent at most {format_bytes(manifest['totals']['information_bytes'])} once" in out


def test_options_reach_the_base(run, full_llama, tmp_path):
    options = ["--bits", "ternary", "--block-size=128", "--embedding_bits", "2", "--skip_modules", "lm_head"]
    assert run("quantize", full_llama, tmp_path / "base", *options, "--max_shard_size", "20kB")[0] == 0
    manifest = read_manifest(tmp_path / "base")
    found = {key: manifest[key] for key in ("bits", "block_size", "embedding_bits", "double_quant", "skip_modules")}
    expected = {"bits": 1, "block_size": 128, "embedding_bits": 2, "double_quant": False, "skip_modules": ["lm_head"]}
    assert found == expected
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    assert run("quantize", full_llama, tmp_path / "base", "--double_quant", "--overwrite")[0] == 0
    assert read_manifest(tmp_path / "base")["double_quant"] is True


def test_json_is_that_of_inspect(run, full_llama, tmp_path):
    code, out, _ = run("quantize", full_llama, tmp_path / "base", "--json")
    assert code == 0 and json.loads(out) == json.loads(run("inspect", tmp_path / "base", "--json")[1])


def test_block_sizes_are_those_of_the_kernels():
    assert BLOCK_SIZES == export._BLOCK_SIZES


def test_choices_of_bits_are_those_of_the_codebooks():
    assert sorted({check_bits(bits) for bits in BITS}) == list(CODEBOOKS)
