# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Adapter configurations that nobody trained: numbers without bounds, and regular expressions without an end."""

import json

import pytest

from fedlpp_hf.merge.merge import merge_adapter

from ..helpers import make_pair, read_files


ENDLESS = r"(.*.*.*.*)*x$"
ENDLESS_WITHOUT_REPETITION = "(?:.|.)" * 26 + "!"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    full, adapter, _ = make_pair(tmp_path_factory.mktemp("pair"))
    return full, adapter


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 10**7}, "r=10000000; expected a whole number from 1 to 65536"),
        ({"r": "x"}, "can't be read|r='x'; expected a whole number"),
        ({"lora_alpha": None}, "lora_alpha=None; expected a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000.*; expected a finite number"),
        ({"rank_pattern": {"q_proj": 10**7}}, "rank_pattern=.*expected names, each with a whole number"),
        ({"alpha_pattern": {"q_proj": "much"}}, "alpha_pattern=.*expected names, each with a finite number"),
        ({"layer_replication": [[0, 10**7]]}, "layer_replication=.*ranges of at most 10000 layers"),
        ({"layer_replication": [[0, 2]] * 10**4}, "layer_replication=.*ranges of at most 10000 layers"),
        ({"layer_replication": "all"}, "layer_replication='all'; expected ranges"),
        ({"target_modules": "(((*"}, "no regular expression"),
        ({"init_lora_weights": 1e308}, "init_lora_weights=1e[+]308; expected a name, true or false"),
        ({"trainable_token_indices": ["x"]}, "trains the tokens .*expected whole numbers"),
        ({"monteclora_config": "x"}, "PEFT can't (build|load|merge)"),
        ({"alora_invocation_tokens": [1]}, "PEFT can't merge the adapter"),
        ({"modules_to_save": 7}, "modules_to_save=7; expected names"),
        ({"megatron_config": {"a": 1}}, "PEFT can't build the adapter"),
        ({"layers_to_transform": 2**62}, "PEFT can't build the adapter"),
    ],
)
def test_values_that_no_training_writes_are_refused(pair, tmp_path, change, reason):
    refuse(pair, tmp_path, change, reason)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 3}},
        {"alpha_pattern": {ENDLESS: 3}},
        {"alpha_pattern": {ENDLESS_WITHOUT_REPETITION: 3}},
        {"layers_pattern": ENDLESS, "layers_to_transform": [0]},
    ],
)
def test_a_pattern_that_never_ends_is_refused_in_time(pair, tmp_path, change):
    refuse(pair, tmp_path, change, "took more than 5 s on this model's .* and may never end")


def test_a_pattern_that_ends_is_merged(pair, tmp_path):
    """As adapters for models of several modalities have it."""
    full, adapter = pair
    merge_adapter(full, adapter, tmp_path / "plain")
    config = json.loads((adapter / "adapter_config.json").read_text())
    names = "|".join(sorted(config["target_modules"]))
    copy_adapter(
        adapter, tmp_path, {"target_modules": rf"(?:.*?(?:layers|blocks).*?(?:self_attn|mlp).*?(?:{names}).*?)"}
    )
    merge_adapter(full, tmp_path / "adapter", tmp_path / "merged")
    assert read_files(tmp_path / "merged") == read_files(tmp_path / "plain")


def refuse(pair, tmp_path, change, reason):
    full, adapter = pair
    copy_adapter(adapter, tmp_path, change)
    with pytest.raises(ValueError, match=reason):
        merge_adapter(full, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def copy_adapter(adapter, directory, change):
    (directory / "adapter").mkdir()
    for file in adapter.iterdir():
        (directory / "adapter" / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config | change))
