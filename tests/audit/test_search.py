# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What is trained longer, and that local-only training is, too."""

import math

import pytest

from fedlpp_hf import load_base
from fedlpp_hf.audit import search
from fedlpp_hf.audit.audit import _audit_coalition, _Scale
from fedlpp_hf.audit.search import TrainingSearch
from tests.helpers import make_rows, make_trainer


def test_longer_training_wins_where_there_is_more_to_learn(llama_base, lora, tmp_path, monkeypatch):
    rows = make_rows(8)
    trained = make_trainer(
        load_base(llama_base), tmp_path, lora, train_dataset={"a": rows, "b": rows}, eval_dataset=rows,
        num_rounds=2, max_steps=1, learning_rate=2e-3, audit_steps=2, audit_longer=4,
    )  # fmt: skip
    trained.train()
    runs = []
    fine_tune = search.fine_tune

    def spy(trainer, rows, start, steps, learning_rate, seed):
        runs.append((tuple(steps), learning_rate))
        return fine_tune(trainer, rows, start, steps, learning_rate, seed)

    monkeypatch.setattr(search, "fine_tune", spy)
    scale = _Scale(trained, trained.eval_dataset)
    server = scale.measure(trained.server.adapter)
    audit = _audit_coalition(trained, scale, ["a"], server, server)
    for found, starts in ((audit.attacks, ("last proxy", "mean of later half")), (audit.local_only, ("base",))):
        best = min(found, key=lambda name: found[name]["loss"])
        assert best in [f"{start} + 8 steps at 0.002" for start in starts]
        longer = [name for name in found if " + 4 steps" in name or " + 8 steps" in name]
        assert longer == [best.replace(" 8 ", " 4 "), best]
    # The mean of the later half of two proxies is the last: it is not trained again. Both sides get runs of the same length.
    assert runs == 2 * [((1, 2), 2e-3), ((1, 2), pytest.approx(6e-4)), ((4, 8), 2e-3)]


@pytest.mark.parametrize(
    ("losses", "longest"),
    [
        ({("x", 1.0): [3, 2], ("x", 0.3): [4, 4], ("y", 1.0): [3, 3], ("y", 0.3): [1, 5]}, "y + 40 steps at 0.3"),
        ({("x", 1.0): [math.inf, math.inf], ("x", 0.3): [9, math.inf]}, "x + 40 steps at 0.3"),
        ({("x", 1.0): [math.inf, math.inf], ("x", 0.3): [math.inf, math.inf]}, None),
    ],
    ids=["best at half", "one diverged", "all diverged"],
)
def test_the_run_with_the_best_loss_is_trained_longer(monkeypatch, losses, longest):
    class Args:
        audit_steps, audit_longer, learning_rate, seed = 10, 4, 1.0, 0

    class Trainer:
        args = Args

    monkeypatch.setattr(search, "digest_adapter", lambda start: start.encode())
    monkeypatch.setattr(
        search,
        "fine_tune",
        lambda trainer, rows, start, steps, rate, seed: {step: (start, rate, step) for step in steps},
    )

    def find_loss(adapter):
        start, rate, step = adapter
        return losses[start, rate][(5, 10).index(step)]

    starts = {start: start for start, _ in losses}
    found = TrainingSearch(Trainer, [], find_loss).search(starts)
    longer = [name for name in found if " + 20 steps" in name or " + 40 steps" in name]
    assert longer == ([] if longest is None else [longest.replace(" 40 ", " 20 "), longest])
    assert len(found) == 2 * len(losses) + len(longer)
    assert TrainingSearch(Trainer, [], find_loss).search({}) == {}
    monkeypatch.setattr(Args, "audit_longer", 1)
    shorter = TrainingSearch(Trainer, [], find_loss).search(starts)
    assert shorter == {name: adapter for name, adapter in found.items() if name not in longer}
