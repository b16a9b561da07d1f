# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A few seconds of the fuzz run over messages, and its promises' own test: they can be broken."""

import pytest
import torch

from benchmarks import fuzz_messages
from fedlpp_hf.server import admission


def test_mutated_messages_are_refused_or_harmless(capfd):
    assert fuzz_messages.run(1500, seed=1) == 0, capfd.readouterr().err
    printed = capfd.readouterr().out
    for kind in ("flip", "header", "forged header", "forged tensors", "made up"):
        assert kind in printed


@pytest.mark.parametrize(
    "break_",
    [
        lambda delta: next(iter(delta.values())).fill_(torch.inf),
        lambda delta: delta.pop(next(iter(delta))),
        lambda delta: 1 / 0,
    ],
)
def test_a_broken_promise_is_found(monkeypatch, break_):
    real = admission.decompress_update

    def decompress_update(payload, reference):
        delta = real(payload, reference)
        break_(delta)
        return delta

    monkeypatch.setattr(admission, "decompress_update", decompress_update)
    assert fuzz_messages.run(150, seed=0) > 0
