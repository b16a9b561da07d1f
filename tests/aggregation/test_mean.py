# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The weighted mean against dense float64 references: whatever the order, the scale, the dtype and the source."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fedlpp_hf.aggregation.mean import average_updates, normalize_weights
from fedlpp_hf.aggregation.rules import aggregate
from fedlpp_hf.tensors.files import TensorFile

from .dense import HEAD, make_adapter, make_round


weights_of_clients = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(weights_of_clients, st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_mean_is_the_dense_one_whatever_order_and_scale(weights, seed, dtype):
    updates = [
        {key: tensor.to(dtype) for key, tensor in make_adapter(seed + k, 2).items()} for k in range(len(weights))
    ]
    mean = average_updates(updates, weights)
    order = sorted(range(len(weights)), key=lambda k: -weights[k])
    permuted = average_updates([updates[k] for k in order], [weights[k] * 7.3 for k in order])
    for key in mean:
        expected = sum(w * u[key].double() for w, u in zip(weights, updates, strict=True)) / sum(weights)
        assert mean[key].dtype == torch.float32
        torch.testing.assert_close(mean[key], expected.float(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(permuted[key], mean[key], rtol=1e-6, atol=1e-7)


def test_mean_of_equal_clients_is_any_one_of_them_bit_for_bit():
    update = make_adapter(0, 4)
    mean = average_updates([update] * 8, [3.0] * 8)
    assert all(torch.equal(mean[key], update[key]) for key in update)


def test_sums_of_many_do_not_drift():
    one = {"w": torch.full((4,), 0.1)}
    mean = average_updates(itertools.repeat(one, 5000), [1.0] * 5000)
    assert torch.equal(mean["w"], one["w"])


def test_files_are_read_as_what_they_hold(tmp_path):
    updates = [make_adapter(k, 2) for k in range(3)]
    for k, update in enumerate(updates):
        save_file(update, tmp_path / f"{k}.safetensors")
    paths = [tmp_path / f"{k % 3}.safetensors" for k in range(99)]
    files = [TensorFile(path) for path in paths]
    expected = average_updates([updates[k % 3] for k in range(99)], [1.0] * 99)
    for source in (files, (TensorFile(path) for path in paths)):
        mean = average_updates(source, [1.0] * 99)
        assert all(torch.equal(mean[key], expected[key]) for key in expected)
    save_file({key: tensor + 1 for key, tensor in updates[0].items()}, paths[0])
    os.utime(paths[0], ns=(0, 0))
    assert torch.equal(TensorFile(paths[0])[HEAD], updates[0][HEAD] + 1)  # not what was read from there before
    save_file(updates[0], paths[0])
    files = [TensorFile(path) for path in paths]
    for robust in ("trimmed_mean", "multi_krum"):
        lazily, plainly = (
            aggregate("fedavg", make_round(source, adapter=updates[0], num_attackers=1), robust).delta
            for source in (files[:9], [updates[k % 3] for k in range(9)])
        )
        assert all(torch.equal(lazily[key], plainly[key]) for key in plainly)


def test_pieces_of_a_tensor_are_put_together(monkeypatch):
    updates = [make_adapter(k, 2) for k in range(5)]
    monkeypatch.setattr("fedlpp_hf.aggregation.mean._CHUNK", 7)
    mean = average_updates(updates, [1.0] * 5)
    for key in mean:
        torch.testing.assert_close(mean[key], torch.stack([update[key] for update in updates]).mean(0))


MEMORY = """
from pathlib import Path
import sys, torch
from benchmarks.aggregation import MemoryPeak, adapter_shapes, average_ours, link_files, write_updates

directory, count = Path(sys.argv[1]), int(sys.argv[2])
files = write_updates(directory, 3, 1, torch.float32)
average_ours(files)
with MemoryPeak() as memory:
    average_ours(link_files(files, count))
print("adapters", (memory.peak - memory.start) / sum(4 * a * b for a, b in adapter_shapes(1).values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_that_of_three_adapters_however_many_clients(tmp_path):
    """In a separate process: what others left on its heap could hide what this leaves there."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), "320"], capture_output=True, text=True, check=True, timeout=280
    )
    assert 0.5 < float(run.stdout.split("adapters")[-1]) < 3.5  # an adapter of 5 MB: half a one for all the rest


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weight|Weight"):
        normalize_weights(weights)


def test_weights_neither_overflow_nor_underflow():
    assert normalize_weights([1e308, 1e308]) == [0.5, 0.5]
    assert normalize_weights([5e-324, 5e-324]) == [0.5, 0.5]


def test_updates_that_differ_are_refused():
    update = make_adapter(0, 2)
    for other, reason in (
        ({key: t for key, t in update.items() if key != HEAD}, "missing"),
        (update | {"x": torch.ones(1)}, "unknown"),
        (update | {HEAD: torch.ones(1)}, "shape"),
    ):
        with pytest.raises(ValueError, match=reason):
            average_updates([update, other], [1.0, 1.0])
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="weights, but"):
            average_updates([update, update], weights)
