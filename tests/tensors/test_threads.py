# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Threads work on a few tensors at a time, in order."""

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
