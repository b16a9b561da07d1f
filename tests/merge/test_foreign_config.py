# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Adapter configurations that nobody trained: numbers without bounds, and regular expressions without an end."""

import json
import shutil

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
        ({"init_lora_weights": "pissa_niter_1000000000"}, "init_lora_weights=.*; expected steps of 3 digits"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 10**9}},
            "loftq_iter of 3 digits",
        ),
        ({"peft_type": "ADALORA", "init_r": 10**9, "total_step": 1}, "init_r=1000000000; expected at most 65536"),
        ({"task_type": "\x1b[2J"}, "can't be read .*Invalid task type: ' \\[2J'"),
        ({"trainable_token_indices": ["x"]}, "trains the tokens .*expected whole numbers"),
        ({"monteclora_config": "x"}, "PEFT can't (build|load|merge)"),
        ({"alora_invocation_tokens": [1]}, "PEFT can't merge the adapter"),
        ({"modules_to_save": 7}, "modules_to_save=7; expected names"),
        ({"target_modules": ["q_proj", *map(str, range(5000))]}, "5001 target_modules; the model has"),
        (
            {"target_modules": "|".join(map(str, range(50_000)))},
            "regular expressions of .* characters; expected at most",
        ),
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


def test_a_configuration_that_would_take_all_memory_is_not_read(pair, tmp_path):
    full, adapter = pair
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    with (copy / "adapter_config.json").open("r+b") as file:
        file.truncate(40 << 30)  # as a hole, which an archive stores in a few bytes
    with pytest.raises(ValueError, match="has 42949672960 bytes; expected at most"):
        merge_adapter(full, copy, tmp_path / "merged")
