# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The facts that stand beside the options, and the lists that are derived from them."""

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
from transformers import TrainingArguments

from fedlpp_hf.config.audit import AuditOptions
from fedlpp_hf.config.federated import GROUPS, FederatedConfig
from fedlpp_hf.config.options import OptionFacts, card_labels, free_options, options_beside, reference_options
from fedlpp_hf.config.run import RunOptions
from fedlpp_hf.tensors.codebooks import FULL_PRECISION


DERIVED = (free_options, options_beside, reference_options, card_labels)


def test_every_group_is_part_of_the_configuration():
    assert set(GROUPS) == {group for group in FederatedConfig.__mro__ if "FACTS" in vars(group)}
    own = {entry.name for entry in fields(FederatedConfig)} - set(TrainingArguments.__dataclass_fields__)
    assert {entry.name for group in GROUPS for entry in fields(group)} == own


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_facts_are_about_options_of_their_group(group):
    facts = group.FACTS
    for names in (facts.card, facts.free, facts.beside, facts.reference):
        assert set(names) <= {entry.name for entry in fields(group)}


@pytest.mark.parametrize("derive", DERIVED)
def test_derived_names_are_fields_of_the_configuration(derive):
    assert set(derive(FederatedConfig)) <= set(FederatedConfig.__dataclass_fields__)


def test_what_no_result_depends_on_is_free_on_resume():
    free = free_options(FederatedConfig)
    for group in (AuditOptions, RunOptions):
        assert {entry.name for entry in fields(group)} <= free
    assert {"output_dir", "report_to", "hub_token", "round_timeout", "min_clients"} <= free
    changes_results = {"seed", "learning_rate", "max_steps", "num_rounds", "partition", "broadcast", "update_bits"}
    assert not free & (changes_results | {"base_bits", "adapter_bits", "aggregation", "robust", "server_optimizer"})


def test_trainers_in_other_processes_have_no_owner_no_audit_and_no_trackers():
    beside = options_beside(FederatedConfig)
    expected = {"full_model": None, "audit": False, "audit_threshold": None, "compare_full_precision": False}
    expected |= {
        "client_workers": 1,
        "merge": False,
        "control_variate": 0.0,
        "base_weights": [0.0],
        "update_scales": [1.0],
        "report_to": [],
        "push_to_hub": False,
    }
    assert expected.items() <= beside.items()
    FederatedConfig("out", use_cpu=True, **{key: value for key, value in beside.items() if key != "full_model"})


def test_reference_is_in_full_precision_with_plain_updates_and_a_plain_mean():
    reference = reference_options(FederatedConfig)
    expected = dict.fromkeys(("base_bits", "adapter_bits", "update_bits"), FULL_PRECISION) | {"update_density": 1.0}
    assert (expected | {"robust": "none", "num_attackers": 0}).items() <= reference.items()


def test_cards_show_what_a_reader_must_know():
    labels = card_labels(FederatedConfig)
    assert {"num_rounds", "base_bits", "adapter_bits", "aggregation", "broadcast", "learning_rate", "seed"} <= set(
        labels
    )
    assert all(label.strip() for label in labels.values()) and len(set(labels.values())) == len(labels)


def test_a_group_that_is_added_brings_its_facts():
    @dataclass
    class Extra:
        FACTS: ClassVar[OptionFacts] = OptionFacts(card={"color": "colour"}, free=("color",), beside={"color": "grey"})
        color: str = "red"

    @dataclass
    class Extended(Extra, FederatedConfig):
        output_dir: str = "out"

    assert "color" in free_options(Extended) and "color" not in free_options(FederatedConfig)
    assert options_beside(Extended) == options_beside(FederatedConfig) | {"color": "grey"}
    assert card_labels(Extended)["color"] == "colour"
    assert free_options(FederatedConfig) == free_options(Extended) - {"color"}
