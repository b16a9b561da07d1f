# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the owner chooses in a round: the share of the variate and λ, and at the end the round that is published."""

import pytest
import torch

from fedlpp_hf.aggregation.optimizers import ServerOptimizer
from fedlpp_hf.aggregation.round import AggregationResult
from fedlpp_hf.server.combine import scale_result
from fedlpp_hf.server.state import ServerState
from fedlpp_hf.server.step import MeanUpdate, check_owner, is_variate_used, take_step
from fedlpp_hf.tensors.adapters import read_adapter

from .small_server import KEY_B, Owner, answer_all, make_server


def step(owner, tmp_path, **options):
    args = make_server(tmp_path).args
    for name, value in options.items():
        setattr(args, name, value)
    before = ServerState({KEY_B: torch.zeros(4, 2)})
    mean = scale_result(AggregationResult({KEY_B: torch.full((4, 2), 2.0)}, report={"scored": 1}))
    update = MeanUpdate(1, mean, before.adapter, [0])
    return take_step(args, owner, ServerOptimizer(), before, update)


@pytest.mark.parametrize(("target", "kept"), [(2.0, 0.0), (1.6, 0.5), (1.5, 0.5), (1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5])
def test_the_pair_with_the_least_loss_is_chosen(tmp_path, target, kept, weight):
    state, report = step(Owner(target, weight), tmp_path, control_variate=1.0, base_weights=[0.0, 0.25, 0.5, 0.75])
    assert (report["variate_weight"], report["base_weight"], state.base_weight) == (kept, weight, weight)
    assert torch.equal(state.adapter[KEY_B], torch.full((4, 2), 2.0 - kept))
    assert report["selection_loss"] == pytest.approx((2.0 - kept - target) ** 2)


@pytest.mark.parametrize(("target", "scale"), [(2.0, 1.0), (2.5, 1.25), (3.0, 1.5), (9.0, 1.5), (0.0, 1.0)])
def test_the_scale_with_the_least_loss_is_chosen(tmp_path, target, scale):
    state, report = step(Owner(target), tmp_path, update_scales=[1.0, 1.25, 1.5])
    assert report["update_scale"] == scale and report["scored"] == 1
    assert torch.equal(state.adapter[KEY_B], torch.full((4, 2), scale * 2.0))
    assert report["selection_loss"] == pytest.approx((scale * 2.0 - target) ** 2)


def test_a_scale_is_of_the_update_less_the_variate(tmp_path):
    """2 less a variate of 1 is nearest to 1.2, with λ of 0.5; then 1.25 times that."""
    options = {"control_variate": 1.0, "base_weights": [0.0, 0.5], "update_scales": [1.0, 1.25]}
    state, report = step(Owner(1.2, 0.5), tmp_path, **options)
    assert (report["variate_weight"], report["base_weight"], report["update_scale"]) == (1.0, 0.5, 1.25)
    assert torch.equal(state.adapter[KEY_B], torch.full((4, 2), 1.25)) and state.base_weight == 0.5


def test_one_scale_needs_no_rows(tmp_path):
    for owner in (None, Owner(selects=False), Owner()):
        state, report = step(owner, tmp_path, update_scales=[1.5])
        assert torch.equal(state.adapter[KEY_B], torch.full((4, 2), 3.0)) and report["update_scale"] == 1.5


def test_without_rows_to_choose_by_the_options_hold(tmp_path):
    state, report = step(Owner(2.0, selects=False), tmp_path, control_variate=1.0, base_weights=[0.25])
    assert torch.equal(state.adapter[KEY_B], torch.ones(4, 2)) and state.base_weight == 0.25
    assert report["base_weight"] == 0.25 and "selection_loss" not in report
    state, report = step(None, tmp_path)
    assert torch.equal(state.adapter[KEY_B], torch.full((4, 2), 2.0)) and report == {"scored": 1}


def test_a_loss_that_is_no_number_is_never_chosen(tmp_path):
    owner = Owner()
    owner.measure_selection = lambda adapter, residual, weights: [float("inf"), 3.0]
    assert step(owner, tmp_path, base_weights=[0.0, 0.5])[0].base_weight == 0.5


def test_choices_that_nobody_can_make_are_refused(tmp_path):
    args = make_server(tmp_path).args
    args.base_weights = [0.5]
    with pytest.raises(ValueError, match=r"base_weights=\[0.5\]: only the owner's process .* set `full_model`"):
        check_owner(args, None)
    check_owner(args, Owner(selects=False))
    args.base_weights = [0.0, 0.5]
    with pytest.raises(ValueError, match="no rows to choose by. Pass `selection_dataset`"):
        check_owner(args, Owner(selects=False))
    check_owner(args, Owner())
    args.base_weights, args.update_scales = [0.0], [1.0, 1.5]
    for owner in (None, Owner(selects=False)):
        with pytest.raises(ValueError, match=r"update_scales=\[1.0, 1.5\] has several values, but there are no rows"):
            check_owner(args, owner)
    check_owner(args, Owner())
    args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="load_best_model_at_end=True with `selection_dataset`"):
        check_owner(args, Owner())


@pytest.mark.parametrize(("target", "best"), [(2.0, 2), (0.0, 0), (-5.0, 0), (9.0, 3)])
def test_the_best_round_is_published_round_0_included(tmp_path, target, best):
    """Each round moves the adapter by one."""
    server = make_server(tmp_path, num_rounds=3)
    server.owner, server.args.base_weights = Owner(target, 0.5), [0.0, 0.5]
    records = server.run(answer_all)
    assert [record.get("base_weight") for record in records] == [None, 0.5, 0.5, 0.5]
    assert [record["metrics"]["server"]["weight"] for record in records] == [0.0, 0.5, 0.5, 0.5]
    assert torch.equal(server.adapter[KEY_B], torch.full((4, 2), float(best)))
    assert torch.equal(read_adapter(tmp_path)[0][KEY_B], server.adapter[KEY_B])
    assert server.state.base_weight == (0.5 if best else 0.0)


def test_the_state_keeps_the_weight(tmp_path):
    state = ServerState({KEY_B: torch.zeros(4, 2)}, {"momentum.x": torch.ones(1)}, {}, 0.75)
    again = ServerState.from_tensors(state.adapter, state.to_tensors())
    assert again.base_weight == 0.75 and torch.equal(again.optimizer["momentum.x"], torch.ones(1))


class CountingOwner(Owner):
    """Notes for which rounds it was asked for the variate."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = []

    def estimate_variate(self, start, number, seeds):
        self.asked.append(number)
        return super().estimate_variate(start, number, seeds)


@pytest.mark.parametrize(("target", "asked"), [(99.0, [1, 2]), (0.0, [1, 2, 3, 4])])
def test_a_variate_that_is_never_chosen_is_no_longer_estimated(tmp_path, target, asked):
    """Far away, the whole way of the clients is best; at 0, the way less the variate is."""
    server = make_server(tmp_path, num_rounds=4)
    server.owner, server.args.control_variate = CountingOwner(target), 1.0
    records = server.run(answer_all)
    assert server.owner.asked == asked
    assert ["variate_weight" in record for record in records[1:]] == [number in asked for number in range(1, 5)]
    again = make_server(tmp_path, num_rounds=6)
    again.owner, again.args.control_variate = CountingOwner(target), 1.0
    again.run(answer_all, resume=True)
    assert again.owner.asked == ([] if len(asked) == 2 else [5, 6])


def test_one_round_without_it_is_not_enough():
    def used(*shares):
        return is_variate_used([{} if share is None else {"variate_weight": share} for share in shares])

    assert used() and used(None) and used(None, 0.0) and used(None, 0.0, 1.0, 0.0) and used(0.5, 0.5)
    assert not used(None, 0.0, 0.0) and not used(1.0, 0.0, 0.0, None, None)


@pytest.mark.parametrize("broadcast", ["every_round", "never"])
def test_the_owner_is_told_before_the_clients_train(tmp_path, broadcast):
    """It can then work beside them: what it will be asked does not depend on their updates."""
    events = []

    class Watched(Owner):
        def begin_variate(self, start, number, seeds):
            events.append(("begin", start, number, list(seeds)))

        def estimate_variate(self, start, number, seeds):
            events.append(("estimate", start, number, list(seeds)))
            return super().estimate_variate(start, number, seeds)

    server = make_server(tmp_path, num_rounds=2, control_variate_runs=2, broadcast=broadcast)
    server.owner, server.args.control_variate = Watched(selects=False), 1.0

    def train(tasks):
        events.append(("train", None, tasks[0].round, None))
        return answer_all(tasks)

    records = server.run(train)
    assert [(event[0], event[2]) for event in events] == [
        (name, number) for number in (1, 2) for name in ("begin", "train", "estimate")
    ]
    for begun, estimated in ((events[0], events[2]), (events[3], events[5])):
        assert begun[3] == estimated[3] and len(set(begun[3])) == 2
        assert all(torch.equal(begun[1][key], value) for key, value in estimated[1].items())
    assert all(0 < record["owner_seconds"] <= record["seconds"] for record in records[1:])
