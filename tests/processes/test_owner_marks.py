# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The owner's process makes marked copies of the base."""

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fedlpp_hf import FederatedTrainer
from fedlpp_hf.base.manifest import check_base
from fedlpp_hf.base.mark_keys import MarkKey
from fedlpp_hf.cli.main import main
from fedlpp_hf.processes.blueprint import TrainerBlueprint
from fedlpp_hf.processes.owner_handler import OwnerHandler
from tests.helpers import make_args


@pytest.fixture
def make_handler(wide_llama, lora, tmp_path):
    """A function from a class of model and options to the owner's side of its process."""

    def make(model_class=AutoModelForCausalLM, **options):
        args = make_args(tmp_path / "out", **options)
        return OwnerHandler(TrainerBlueprint(str(wide_llama), args, FederatedTrainer, model_class, lora), tmp_path)

    return make


@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, LlamaForCausalLM, None])
def test_copy_is_that_of_the_command_line(make_handler, wide_llama, tmp_path, model_class):
    """An owner may hand some copies over by hand, with the same key."""
    key = str(tmp_path / "marks.json")
    make_handler(model_class).export_base({}, str(tmp_path / "sent"), [key, "a"])
    main(["quantize", str(wide_llama), str(tmp_path / "by-hand"), "--mark", "a", "--key", key])
    sent, by_hand = check_base(tmp_path / "sent"), check_base(tmp_path / "by-hand")
    assert sent["copy"] == by_hand["copy"] and MarkKey.read(key).clients == ["a"]
    make_handler(model_class).export_base({}, str(tmp_path / "plain"), None)
    plain = check_base(tmp_path / "plain")
    assert plain["fingerprint"] == sent["fingerprint"] and plain["copy"] != sent["copy"]


class OwnLlama(LlamaForCausalLM):
    """A class that `trace` could not find."""


@pytest.mark.parametrize(
    "model_class, options, message",
    [
        (None, {"base_bits": 8}, "base_bits=8: only a base of 1 to 4 bits"),
        (OwnLlama, {}, "OwnLlama is no class of transformers"),
    ],
)
def test_copy_that_could_not_be_traced_is_not_made(make_handler, tmp_path, model_class, options, message):
    with pytest.raises(ValueError, match=message):
        make_handler(model_class, **options).export_base({}, str(tmp_path / "sent"), [str(tmp_path / "key"), "a"])
    assert not (tmp_path / "sent").exists() and not (tmp_path / "key").exists()
