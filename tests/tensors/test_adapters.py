# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Adapters: read, written and loaded as a whole or not at all, and always a plain PEFT repository."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from fedlpp_hf.tensors.adapters import (
    adapter_parameters,
    check_keys,
    check_tensors,
    copy_adapter,
    load_adapter_,
    read_adapter,
    scrub_config,
    write_adapter,
)
from fedlpp_hf.tensors.lora import PREFIX, lora_factors, lora_scale


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"model_type": "toy"}
        self.words = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.down(self.up(self.words(ids)).relu()))


def build_model(**settings):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"], "modules_to_save": ["head"]} | settings
    model = get_peft_model(Network(), LoraConfig(**settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)  # B = 0 would hide errors
    return model


@pytest.fixture
def model():
    return build_model()


@pytest.fixture
def written(model, tmp_path):
    write_adapter(tmp_path / "adapter", copy_adapter(adapter_parameters(model)), model.peft_config["default"])
    return tmp_path / "adapter"


def test_parameters_are_the_live_trainable_ones_under_peft_names(model):
    parameters = adapter_parameters(model)
    assert {id(p) for p in parameters.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert parameters.keys() == {
        f"{PREFIX}up.lora_A.weight", f"{PREFIX}up.lora_B.weight", f"{PREFIX}down.lora_A.weight",
        f"{PREFIX}down.lora_B.weight", f"{PREFIX}head.weight", f"{PREFIX}head.bias",
    }  # fmt: skip


def test_parameters_of_embedding_targets_are_there_too():
    model = build_model(target_modules=["words", "up"])
    names = {key.removeprefix(PREFIX) for key in adapter_parameters(model)}
    assert {"words.lora_embedding_A", "words.lora_embedding_B"} <= names
    assert "words.weight" not in names
    factors = lora_factors(adapter_parameters(model), model.peft_config["default"])
    assert factors["words"].key_b == f"{PREFIX}words.lora_embedding_B"


def test_peft_reads_what_we_write(model, written):
    ids = torch.arange(11)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Network(), written)
    assert torch.equal(again(ids), model(ids))


def test_we_read_what_peft_writes(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors, config = read_adapter(tmp_path)
    assert tensors.keys() == adapter_parameters(model).keys()
    assert config["r"] == 4
    other = build_model()
    load_adapter_(adapter_parameters(other), tensors)
    assert torch.equal(other(torch.arange(11)), model(torch.arange(11)))


def test_loading_copies_in_place(model):
    """An optimizer that holds the parameters must go on training what the model computes with."""
    parameters = adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    addresses = {key: parameter.data_ptr() for key, parameter in parameters.items()}
    load_adapter_(parameters, {key: torch.full_like(p, 0.5) for key, p in parameters.items()})
    assert all(parameter.data_ptr() == addresses[key] for key, parameter in adapter_parameters(model).items())
    assert all(parameter.requires_grad and (parameter == 0.5).all() for parameter in parameters.values())
    model(torch.arange(11)).sum().backward()
    optimizer.step()
    assert not any((parameter == 0.5).all() for parameter in adapter_parameters(model).values())


def test_copies_are_float32_and_do_not_follow(model):
    model.to(torch.bfloat16)
    parameters = adapter_parameters(model)
    copies = copy_adapter(parameters)
    before = {key: tensor.clone() for key, tensor in copies.items()}
    load_adapter_(parameters, {key: torch.zeros_like(p) for key, p in parameters.items()})
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in copies.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in copies.items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{PREFIX}up.lora_B.weight"), r"missing: base_model\.model\.up\.lora_B\.weight"),
        (lambda t: t.update({f"{PREFIX}up.lora_C.weight": torch.ones(1)}), r"unknown: .*lora_C.*nearest: .*up\.lora_"),
        (lambda t: t.update({f"{PREFIX}head.bias": torch.ones(4)}), r"head\.bias.*\(4,\); expected \(3,\)"),
        (lambda t: t[f"{PREFIX}head.bias"].fill_(float("nan")), r"head\.bias.*NaN"),
        (lambda t: t[f"{PREFIX}down.lora_A.weight"].view(-1)[-1:].fill_(float("inf")), r"down\.lora_A.*infinite"),
        (lambda t: t.update({f"{PREFIX}head.bias": torch.ones(3, dtype=torch.int64)}), r"head\.bias.*int64"),
    ],
)
def test_wrong_tensors_are_refused_and_nothing_is_loaded(damage, message, model):
    parameters = adapter_parameters(model)
    before = copy_adapter(parameters)
    tensors = {key: tensor + 1 for key, tensor in before.items()}
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        load_adapter_(parameters, tensors)
    assert all(torch.equal(parameters[key], tensor) for key, tensor in before.items())


def test_errors_stay_short_and_say_what():
    with pytest.raises(ValueError, match=r"The update's .*missing: a0, a1, a2 and 17 more") as error:
        check_keys([], [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(10)], "update")
    assert len(str(error.value)) < 300
    check_keys(["b", "a"], ("a", "b"))
    check_tensors({}, {})


def test_scales_are_those_that_peft_uses():
    for settings in (
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up": 2}},
        {"alpha_pattern": {"down": 32}},
        {"rank_pattern": {"^up": 16}, "alpha_pattern": {"up": 3}, "use_rslora": True},
    ):
        model = build_model(**settings)
        factors = lora_factors(adapter_parameters(model), model.peft_config["default"])
        assert factors.keys() == {"up", "down"}
        for name, target in factors.items():
            layer = model.base_model.model.get_submodule(name)
            assert target.scale == pytest.approx(layer.scaling["default"]), settings
            a, b = (adapter_parameters(model)[key] for key in (target.key_a, target.key_b))
            torch.testing.assert_close(target.scale * b @ a, layer.get_delta_weight("default"))


def test_scales_from_the_written_configuration(written, model):
    tensors, config = read_adapter(written)
    assert lora_factors(tensors, config) == lora_factors(tensors, model.peft_config["default"])
    assert lora_scale(config, "up") == 2.0


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_factor_without_partner_is_refused(lost):
    keys = {f"{PREFIX}up.lora_A.weight", f"{PREFIX}up.lora_B.weight"} - {f"{PREFIX}up.{lost}.weight"}
    with pytest.raises(ValueError, match=f"partner `{lost}`"):
        lora_factors(keys, {"r": 1, "lora_alpha": 1})


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_repositories_are_refused(name, written):
    data = (written / name).read_bytes()
    (written / name).write_bytes(data[:-20])
    with pytest.raises(ValueError, match="truncated"):
        read_adapter(written)
    (written / name).unlink()
    with pytest.raises(ValueError, match=f"has no `{name}`"):
        read_adapter(written)


def test_pickled_adapter_is_not_read(written):
    (written / "adapter_model.safetensors").rename(written / "adapter_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        read_adapter(written)


def test_written_configuration_tells_nothing_of_the_base(tmp_path):
    config = LoraConfig(r=2, target_modules=["up"], base_model_name_or_path="/home/owner/secret", revision="abc123")
    write_adapter(tmp_path, {"x": torch.ones(4, 4).T}, config)
    content = (tmp_path / "adapter_config.json").read_text()
    assert "secret" not in content
    assert "abc123" not in content
    assert json.loads(content) == json.loads(json.dumps(scrub_config(config)))
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {"x"}


def test_written_files_are_reproducible(tmp_path):
    """`target_modules` is a set, whose order changes from process to process."""
    for name in ("a", "b"):
        modules = ["up", "down", "head", "words"]
        config = LoraConfig(r=2, target_modules=modules if name == "a" else modules[::-1])
        write_adapter(tmp_path / name, {"x": torch.ones(4)}, config)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
