# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Threads work on a few tensors at a time, in order."""

import threading
import time

import pytest
import torch

from fedlpp_hf.tensors.threads import map_in_order, tensor_threads


def test_few_tensors_are_in_hand_and_come_in_order():
    taken = []

    def read():
        for number in range(20):
            taken.append(number)
            yield number

    with tensor_threads() as pool:
        results = map_in_order(pool, lambda number: number * 10, read())
        for number, result in enumerate(results):
            assert result == number * 10
            assert len(taken) <= number + torch.get_num_threads() + 1


@pytest.mark.parametrize("count", [None, 1, 3])
def test_threads_compute_alone_and_the_count_comes_back(count):
    before = torch.get_num_threads()
    with tensor_threads(count) as pool:
        assert set(map_in_order(pool, lambda _: torch.get_num_threads(), range(9))) == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("limit", [None, 50])
def test_nothing_is_worked_on_after_a_failure(limit):
    begun, running = [], threading.Event()

    def work(number):
        begun.append(number)
        if number == 3:
            running.wait(10)
            raise KeyError("three")
        if number > 3:
            running.set()
            time.sleep(0.05)
        return number

    with tensor_threads(2) as pool:
        with pytest.raises(KeyError, match="three"):
            list(map_in_order(pool, work, range(50), limit))
        seen = len(begun)
        time.sleep(0.2)
        assert len(begun) == seen < 50
