# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The best round is published where that is asked for, and a run ends early where a listener says so."""

import math

import pytest
import torch

from fedlpp_hf.config.metrics import MetricChoice
from fedlpp_hf.server.best import find_published_round
from fedlpp_hf.server.store import RoundStore
from fedlpp_hf.tensors.adapters import read_adapter

from .small_server import KEY_B, answer_all, make_server


def make_records(values, view="server", name="eval_loss"):
    return [{"round": number, "metrics": {view: {name: value}}} for number, value in enumerate(values)]


@pytest.mark.parametrize(
    "values, best",
    [
        ([0.1, 3.0, 2.0, 2.5], 2),  # round 0 has learned nothing
        ([9.0, 2.0, 2.0], 1),
        ([9.0, math.nan, 5.0, 4.0], 3),
        ([9.0, math.nan, math.nan], 2),
        ([9.0, None, "text"], 2),
        ([9.0], 0),
    ],
    ids=str,
)
def test_best_round_is_the_first_of_the_best(tmp_path, values, best):
    args = make_server(tmp_path, load_best_model_at_end=True).args
    assert find_published_round(args, make_records(values)) == best
    assert find_published_round(args, make_records(values, "proxy")) == best  # where nobody holds the full model
    args.load_best_model_at_end = False
    assert find_published_round(args, make_records(values)) == len(values) - 1


def test_greater_is_better_decides(tmp_path):
    for metric, greater, best in (("f1", None, 2), ("f1", False, 1), ("mse", None, 1), ("eval_mse", True, 2)):
        args = make_server(
            tmp_path, load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better=greater
        ).args
        name = metric if metric.startswith("eval_") else f"eval_{metric}"
        assert find_published_round(args, make_records([0.0, 1.0, 2.0, 1.5], name=name)) == best


def judge(server, losses):
    server.evaluate_proxy = lambda adapter: {"eval_loss": losses[round(adapter[KEY_B][0, 0].item())]}
    return server


def test_best_round_is_published_and_resumed_from_the_last(tmp_path):
    losses = [9.0, 3.0, 1.0, 2.0, 0.5]
    server = judge(make_server(tmp_path, num_rounds=3, load_best_model_at_end=True), losses)
    server.run(answer_all)
    assert torch.equal(server.adapter[KEY_B], torch.full((4, 2), 2.0))
    assert torch.equal(read_adapter(tmp_path)[0][KEY_B], torch.full((4, 2), 2.0))
    assert torch.equal(
        server.client_adapter()[KEY_B], torch.full((4, 2), 3.0)
    )  # what clients have is the last round's
    longer = judge(make_server(tmp_path, num_rounds=4, load_best_model_at_end=True), losses)
    longer.run(answer_all, resume=True)
    assert torch.equal(longer.adapter[KEY_B], torch.full((4, 2), 4.0))
    assert torch.equal(read_adapter(tmp_path)[0][KEY_B], torch.full((4, 2), 4.0))


def test_metric_that_is_not_measured_is_refused_before_a_client_trains(tmp_path):
    for options, message in (
        (
            {"metric_for_best_model": "f1"},
            "'f1' with load_best_model_at_end=True: .* no number `eval_f1`.*.eval_loss.",
        ),
        ({}, None),
    ):
        server = judge(make_server(tmp_path / str(message), load_best_model_at_end=True, **options), [3.0, 2.0, 1.0])
        if message is None:
            server.run(answer_all)
            continue
        with pytest.raises(ValueError, match=message):
            server.run(lambda tasks: pytest.fail("a client was asked"))
        assert server.store.latest() is None
    with pytest.raises(ValueError, match="none: pass `eval_dataset`"):
        make_server(tmp_path / "unmeasured", load_best_model_at_end=True).run(answer_all)


def test_a_listener_ends_the_run_after_its_round(tmp_path):
    server = make_server(tmp_path, num_rounds=5)
    server.on_round = lambda record: record["round"] == 2
    assert [record["round"] for record in server.run(answer_all)] == [0, 1, 2]
    resumed = make_server(tmp_path, num_rounds=5)
    assert [record["round"] for record in resumed.run(answer_all, resume=True)] == [0, 1, 2, 3, 4, 5]
    whole = make_server(tmp_path / "whole", num_rounds=5)
    whole.run(answer_all)
    assert all(torch.equal(resumed.adapter[key], value) for key, value in whole.adapter.items())


def test_metrics_of_the_server_are_in_the_order_of_the_trainers(tmp_path):
    """Which is the first decides on the headline, and what comes from the owner's process is sorted by name."""
    names = ["eval_loss", "eval_f1", "eval_accuracy"]

    class Owner:
        selects = False

        def evaluate(self, adapter, residual, base_weight):
            return dict.fromkeys([*sorted(names), "eval_more"], 0.5)

    for resume, options in ((False, {"num_rounds": 1}), (True, {"num_rounds": 2})):
        server = make_server(tmp_path, **options)
        server.evaluate_proxy, server.owner = lambda adapter: dict.fromkeys(names, 0.5), Owner()
        records = server.run(answer_all, resume)
    assert all(list(record["metrics"]["server"]) == [*names, "eval_more"] for record in records)
    assert {MetricChoice().main(view) for record in records for view in record["metrics"].values()} == {"eval_f1"}


def list_kept(output_dir):
    return sorted(
        int(path.parent.name[-5:]) for path in output_dir.glob("_federation/rounds/*/adapter_model.safetensors")
    )


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"save_total_limit": None}, [0, 1, 2, 3, 4, 5]),
        ({"save_total_limit": 0}, [0, 1, 2, 3, 4, 5]),  # no limit, as to a Trainer
        ({"save_total_limit": 1}, [0, 5]),
        ({"save_total_limit": 2, "load_best_model_at_end": True}, [0, 2, 4, 5]),
        ({"save_total_limit": 1, "metric_for_best_model": "loss"}, [0, 2, 5]),  # best_model_checkpoint names it
        ({"save_total_limit": 9}, [0, 1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_last_rounds_the_best_and_the_first_are_kept(tmp_path, options, kept):
    losses = [9.0, 3.0, 1.0, 2.0, 4.0, 5.0, 0.5]
    whole = judge(make_server(tmp_path / "whole", num_rounds=5, **options | {"save_total_limit": None}), losses)
    whole.run(answer_all)
    server = judge(make_server(tmp_path / "out", num_rounds=3, **options), losses)
    server.run(answer_all)
    server = judge(make_server(tmp_path / "out", num_rounds=5, **options), losses)
    records = server.run(answer_all, resume=True)
    assert list_kept(tmp_path / "out") == kept
    assert [record["round"] for record in records] == [0, 1, 2, 3, 4, 5]
    assert torch.equal(server.adapter[KEY_B], whole.adapter[KEY_B])
    assert torch.equal(read_adapter(tmp_path / "out")[0][KEY_B], read_adapter(tmp_path / "whole")[0][KEY_B])


def test_round_of_the_least_selection_loss_survives(tmp_path):
    class Owner:
        selects = True

        def measure_selection(self, adapter, residual, base_weights):
            return [losses[round(adapter[KEY_B][0, 0].item())]] * len(base_weights)

        def evaluate(self, adapter, residual, base_weight):
            return {"eval_loss": 1.0}

    losses = [2.0, 1.0, 3.0, 4.0, 5.0]
    server = make_server(tmp_path, num_rounds=4, save_total_limit=1)
    server.owner = Owner()
    server.run(answer_all)
    assert list_kept(tmp_path) == [0, 1, 4]
    assert torch.equal(server.adapter[KEY_B], torch.full((4, 2), 1.0))


def test_deleted_round_is_named_before_a_client_trains(tmp_path):
    losses = [9.0, 3.0, 1.0, 2.0, 0.5]
    judge(make_server(tmp_path, num_rounds=3, save_total_limit=1), losses).run(answer_all)
    with pytest.raises(ValueError, match="Round 2 .* no tensors any more: save_total_limit keeps the last rounds"):
        RoundStore(tmp_path).load(2)
    server = judge(make_server(tmp_path, num_rounds=4, load_best_model_at_end=True), losses)
    with pytest.raises(ValueError, match="Round 2 .* no tensors any more"):
        server.run(lambda tasks: pytest.fail("a client was asked"), resume=True)
