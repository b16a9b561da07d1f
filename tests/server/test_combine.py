# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Multiples of a round's mean: of products where those are averaged, and without drawing noise again."""

import pytest
import torch

from fedlpp_hf.aggregation.round import AggregationResult
from fedlpp_hf.server.combine import scale_result

from .small_server import KEY_A, KEY_B, Owner, answer_all, make_server


def test_a_released_mean_is_multiplied_and_stays_as_it_is():
    result = AggregationResult({KEY_B: torch.ones(2)}, report={"privacy": {}})
    at = scale_result(result)
    assert at(1.0, {}) is result
    assert torch.equal(at(1.5, {}).delta[KEY_B], torch.full((2,), 1.5)) and at(1.5, {}).report == {"privacy": {}}
    assert torch.equal(at(1.5, {KEY_B: torch.full((2,), 0.5)}).delta[KEY_B], torch.full((2,), 0.75))
    assert torch.equal(result.delta[KEY_B], torch.ones(2))


@pytest.mark.parametrize("aggregation", ["fedavg", "freeze_a", "exact"])
@pytest.mark.parametrize("broadcast", ["every_round", "never"])
def test_the_server_moves_by_the_multiple(tmp_path, aggregation, broadcast):
    """Every client moves B from 0 to 1, and A by 1 where that is trained."""

    def train(tasks):
        found = answer_all(tasks)
        for update in found if aggregation == "freeze_a" else ():
            del update.delta[KEY_A]
        return found

    products = {}
    for scale in (1.0, 1.5):
        options = {"aggregation": aggregation, "broadcast": broadcast, "num_rounds": 1, "update_scales": [scale]}
        server = make_server(tmp_path / str(scale), **options)
        start = server.adapter
        server.run(train)
        products[scale] = server.adapter[KEY_B] @ server.adapter[KEY_A]
    if aggregation == "fedavg":
        moved = (start[KEY_B] + 1.5) @ (start[KEY_A] + 1.5)
        torch.testing.assert_close(products[1.5], moved)
    else:
        torch.testing.assert_close(products[1.5], 1.5 * products[1.0], rtol=1e-5, atol=1e-5)


def test_the_chosen_multiple_is_kept_and_resumed_to_the_same_bits(tmp_path):
    """Nothing is broadcast: each round's step starts from the untouched adapter, whatever was chosen before."""

    def run(directory, stop_after, resume=False):
        server = make_server(directory, num_rounds=3, aggregation="exact", broadcast="never")
        server.owner, server.args.update_scales = Owner(target=99.0), [1.0, 1.25, 1.5]

        def train(tasks):
            if tasks[0].round > stop_after:
                raise KeyboardInterrupt
            return answer_all(tasks)

        try:
            return server, server.run(train, resume)
        except KeyboardInterrupt:
            return server, server.store.records()

    whole, records = run(tmp_path / "whole", 3)
    assert [record.get("update_scale") for record in records] == [None, 1.5, 1.5, 1.5]
    run(tmp_path / "parts", 1)
    again, later = run(tmp_path / "parts", 3, resume=True)
    assert [record["selection_loss"] for record in later] == [record["selection_loss"] for record in records]
    assert all(torch.equal(again.adapter[key], value) for key, value in whole.adapter.items())
