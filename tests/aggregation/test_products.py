# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The exact mean of products B·A against dense float64 references: its best part, its residual, and what is dropped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlpp_hf.aggregation.mean import average_updates, normalize_weights
from fedlpp_hf.aggregation.products import decompose_product, join_residual, stack_products
from fedlpp_hf.aggregation.rules import aggregate
from fedlpp_hf.tensors.adapters import read_adapter, write_adapter
from fedlpp_hf.tensors.lora import lora_factors

from .dense import HEAD, E, Q, add, assert_close, coarse, dense, make_adapter, make_config, make_round, total


def run_exact(server, start, updates, weights, config, **changes):
    result = aggregate("exact", make_round(updates, weights, server, start, config, **changes))
    return add(server, result.delta), result


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.01, 1e6), min_size=1, max_size=5),
    st.integers(0, 99),
    st.integers(1, 6),
    st.integers(1, 64),
    st.booleans(),
)
def test_exact_moves_the_product_by_the_clients_mean(weights, seed, rank, alpha, rslora):
    config = make_config(rank, alpha, rslora)
    server = make_adapter(seed, rank)
    start = coarse(server)
    updates = [make_adapter(seed + 1 + k, rank, 0.3) for k in range(len(weights))]
    new, result = run_exact(server, start, updates, weights, config)
    clients = [dense(add(start, update), config) for update in updates]
    old, began = dense(server, config), dense(start, config)
    shares = normalize_weights(weights)
    expected = {
        key: old[key] + sum(p * (client[key] - began[key]) for p, client in zip(shares, clients, strict=True))
        for key in old
    }
    assert_close(total(new, result.residual, config), expected, 1e-3)
    assert result.report["dropped_norm"] <= 1e-3
    # What is broadcast is the best of its rank (Eckart-Young), and the reported residual is the rest.
    squares = 0.0
    for key, product in dense(new, config).items():
        if key != HEAD:
            s = torch.linalg.svdvals(expected[key])
            rest = float((expected[key] - product).norm())
            assert rest == pytest.approx(float(s[rank:].norm()), abs=1e-3 * (1 + float(s[0])))
            squares += rest**2
    assert result.report["residual_norm"] == pytest.approx(squares**0.5, rel=1e-3, abs=1e-2)


def test_averaging_factors_misses_the_mean_product_and_exact_does_not():
    config, zero = make_config(4), make_adapter(0, 4, 0.0)
    updates = [make_adapter(k, 4) for k in range(1, 9)]
    mean = sum(dense(update, config)["q"] for update in updates) / 8
    factorwise = dense(average_updates(updates, [1.0] * 8), config)["q"]
    _, result = run_exact(zero, zero, updates, [1.0] * 8, config)
    assert float((factorwise - mean).norm() / mean.norm()) > 0.5
    assert_close({"q": total(add(zero, result.delta), result.residual, config)["q"]}, {"q": mean})


def test_the_residual_comes_back_when_there_is_room_for_it():
    config = make_config(4)
    server = make_adapter(0, 4)
    updates = [make_adapter(k, 4, 0.3) for k in (1, 2, 3)]
    new, first = run_exact(server, server, updates, [1.0] * 3, config)
    still = {key: torch.zeros_like(tensor) for key, tensor in server.items()}
    again, second = run_exact(new, new, [still], [1.0], config, residual=first.residual)
    assert first.residual
    assert_close(total(again, second.residual, config), total(new, first.residual, config), 1e-3)


def test_a_bounded_residual_reports_what_it_drops(monkeypatch):
    config = make_config(2)
    server = make_adapter(0, 2)
    updates = [make_adapter(k, 2) for k in range(1, 5)]
    whole, everything = run_exact(server, server, updates, [1.0] * 4, config)
    monkeypatch.setattr("fedlpp_hf.aggregation.exact.RESIDUAL_RANK", 1)
    cut, bounded = run_exact(server, server, updates, [1.0] * 4, config)
    assert all(len(tensor) == 1 for key, tensor in bounded.residual.items() if "_A" in key)
    full, part = total(whole, everything.residual, config), total(cut, bounded.residual, config)
    lost = sum(float((full[key] - part[key]).norm()) ** 2 for key in full) ** 0.5
    assert bounded.report["dropped_norm"] == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("start_zero", [Q.format("lora_B"), E.format("lora_embedding_A")])
def test_the_factor_that_lora_starts_with_keeps_its_norm(start_zero):
    server = make_adapter(0, 4)
    for key in (Q.format("lora_B"), E.format("lora_embedding_A")):
        server[key] = torch.zeros_like(server[key])
    new, _ = run_exact(server, server, [make_adapter(1, 4, 0.01)], [1.0], make_config(4))
    other = start_zero.replace("_B", "_X").replace("_A", "_B").replace("_X", "_A")
    assert float(new[other].norm()) == pytest.approx(float(server[other].norm()), rel=1e-4)
    # Turned towards what it was, so that a small update moves it little from orthogonal rows of the same size.
    cosine = torch.nn.functional.cosine_similarity(new[other].flatten(), server[other].flatten(), dim=0)
    assert cosine > 0.7


def test_no_update_leaves_the_product():
    config, server = make_config(4), make_adapter(0, 4)
    still = {key: torch.zeros_like(tensor) for key, tensor in server.items()}
    new, result = run_exact(server, coarse(server), [still], [1.0], config)
    assert_close(dense(new, config), dense(server, config))
    assert result.residual == {}


def test_a_wide_stack_is_folded_without_loss():
    g = torch.Generator().manual_seed(0)
    terms = [
        (torch.randn(10, 3, generator=g, dtype=torch.float64), torch.randn(3, 12, generator=g, dtype=torch.float64))
        for _ in range(40)
    ]
    left, right = stack_products(iter(terms))
    assert left.shape[1] <= 23
    torch.testing.assert_close(left @ right, sum(a @ b for a, b in terms))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_decomposition_is_the_dense_svd(rows, columns, width, seed):
    g = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, width, generator=g, dtype=torch.float64)
    right = torch.randn(width, columns, generator=g, dtype=torch.float64)
    u, s, vh = decompose_product(left, right)
    torch.testing.assert_close((u * s) @ vh, left @ right)
    torch.testing.assert_close(s, torch.linalg.svdvals(left @ right)[: len(s)])


@pytest.mark.parametrize("rslora", [False, True])
def test_a_joined_residual_is_a_plain_adapter(tmp_path, rslora):
    config = make_config(2, rslora=rslora, rank_pattern={"conv": 2}, alpha_pattern={"q": 5})
    server = make_adapter(0, 2)
    new, result = run_exact(server, server, [make_adapter(k, 2) for k in (1, 2)], [1.0, 1.0], config)
    joined, wide = join_residual(new, result.residual, config)
    write_adapter(tmp_path, joined, wide)
    tensors, saved = read_adapter(tmp_path)
    for module, target in lora_factors(server, config).items():
        assert lora_factors(tensors, saved)[module].scale == pytest.approx(target.scale)
        rank = len(tensors[target.key_a])
        assert saved["rank_pattern"][f"^{module}"] == rank == tensors[target.key_b].shape[1]
