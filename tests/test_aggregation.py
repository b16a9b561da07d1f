# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Aggregation against dense float64 references: means, products, mixed ranks, robust rules, and what is refused."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file

from fedlpp_hf.aggregation.products import (
    decompose_product,
    join_residual,
    pad_update,
    stack_products,
    truncate_adapter,
)
from fedlpp_hf.aggregation.robust import (
    coordinate_median,
    geometric_median_weights,
    gram_matrix,
    krum_weights,
    norm_clipping_scales,
    trimmed_mean,
)
from fedlpp_hf.aggregation.rules import aggregate, average_updates, normalize_weights
from fedlpp_hf.config.rules import RULES, check_rule, trainable_keys
from fedlpp_hf.privacy.clipping import (
    add_control_gradient_,
    add_proximal_gradient_,
    check_norm,
    clip_update,
    update_client_control,
    update_norm,
    update_server_control,
)
from fedlpp_hf.tensors.adapters import lora_factors, read_adapter, write_adapter
from fedlpp_hf.tensors.files import TensorFile
from fedlpp_hf.tensors.quantization import dequantize, quantize


Q = "base_model.model.q.{}.weight"
E = "base_model.model.embed.{}"
C = "base_model.model.conv.{}.weight"
HEAD = "base_model.model.head.weight"


def make_adapter(seed: int, rank: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    """A linear, an embedding and a convolution, and a tensor outside LoRA; the linear's output is smaller than the rank."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        Q.format("lora_A"): (rank, 20),
        Q.format("lora_B"): (14, rank),
        Q.format("lora_A").replace(".q.", ".classifier."): (rank, 20),
        Q.format("lora_B").replace(".q.", ".classifier."): (3, rank),
        E.format("lora_embedding_A"): (rank, 30),
        E.format("lora_embedding_B"): (16, rank),
        C.format("lora_A"): (rank, 5, 3, 3),
        C.format("lora_B"): (12, rank, 1, 1),
        HEAD: (3, 7),
    }
    return {key: size * torch.randn(shape, generator=g) for key, shape in shapes.items()}


def make_config(rank: int, alpha: int = 16, rslora: bool = False, **kwargs) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["q"], **kwargs)


def dense(tensors, config) -> dict[str, torch.Tensor]:
    """ΔW of every target, and the tensors outside LoRA, float64."""
    products = {
        module: t.scale * (tensors[t.key_b].double().flatten(1) @ tensors[t.key_a].double().flatten(1))
        for module, t in lora_factors(tensors, config).items()
    }
    return products | {HEAD: tensors[HEAD].double()}


def add(first, second):
    return {key: tensor + second.get(key, 0) for key, tensor in first.items()}


def coarse(adapter):
    return {key: dequantize(quantize(tensor, 3, 64)) for key, tensor in adapter.items()}


def total(adapter, residual, config):
    """What the server stands for: its adapter and its residual."""
    return dense(*join_residual(adapter, residual, config))


def assert_same(first, second, tolerance=1e-4):
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=tolerance, atol=tolerance)


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


def test_equal_clients_are_any_one_of_them_to_the_bit():
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
    for robust in ("trimmed_mean", "krum"):
        lazily, plainly = (
            aggregate(
                "fedavg",
                source,
                [1.0] * 9,
                adapter=updates[0],
                proxy=updates[0],
                peft_config=make_config(2),
                robust=robust,
                num_attackers=1,
            ).delta
            for source in (files[:9], [updates[k % 3] for k in range(9)])
        )
        assert all(torch.equal(lazily[key], plainly[key]) for key in plainly)


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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_that_of_three_adapters_however_many_clients(tmp_path):
    """In a process of its own: what others left on its heap could hide what this leaves there."""
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


# Products


def run_exact(server, proxy, updates, weights, config, **kwargs):
    result = aggregate("exact", updates, weights, adapter=server, proxy=proxy, peft_config=config, **kwargs)
    return add(server, result.delta), result


@settings(max_examples=25, deadline=None)
@given(weights_of_clients, st.integers(0, 99), st.integers(1, 6), st.integers(1, 64), st.booleans(), st.booleans())
def test_exact_moves_the_product_by_the_clients_mean(weights, seed, rank, alpha, rslora, mixed):
    config = make_config(rank, alpha, rslora)
    server = make_adapter(seed, rank)
    proxy = coarse(server)
    updates = [make_adapter(seed + 1 + k, rank, 0.3) for k in range(len(weights))]
    new, result = run_exact(server, proxy, updates, weights, config, mixed_ranks=mixed)
    clients = [dense(add(proxy, update), config) for update in updates]
    old, start = dense(server, config), dense(proxy, config)
    shares = normalize_weights(weights)
    expected = {
        key: old[key] + sum(p * (client[key] - start[key]) for p, client in zip(shares, clients, strict=True))
        for key in old
    }
    assert_same(total(new, result.residual, config), expected, 1e-3)
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
    assert_same({"q": total(add(zero, result.delta), result.residual, config)["q"]}, {"q": mean})


def test_the_residual_comes_back_when_there_is_room_for_it():
    config = make_config(4)
    server = make_adapter(0, 4)
    updates = [make_adapter(k, 4, 0.3) for k in (1, 2, 3)]
    new, first = run_exact(server, server, updates, [1.0] * 3, config)
    still = {key: torch.zeros_like(tensor) for key, tensor in server.items()}
    again, second = run_exact(new, new, [still], [1.0], config, residual=first.residual)
    assert first.residual
    assert_same(total(again, second.residual, config), total(new, first.residual, config), 1e-3)


def test_a_bounded_residual_reports_what_it_drops():
    config = make_config(2)
    server = make_adapter(0, 2)
    updates = [make_adapter(k, 2) for k in range(1, 5)]
    whole, everything = run_exact(server, server, updates, [1.0] * 4, config)
    cut, bounded = run_exact(server, server, updates, [1.0] * 4, config, residual_rank=1)
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
    assert_same(dense(new, config), dense(server, config))
    assert result.residual == {}


def test_stack_is_the_clients_mean_and_leaves_the_adapter():
    config = make_config(4)
    server = make_adapter(0, 4)
    updates = [make_adapter(k, 4, 0.3) for k in (1, 2, 3)]
    result = aggregate("stack", updates, [1.0, 2.0, 3.0], adapter=server, proxy=server, peft_config=config)
    assert set(result.delta) == {HEAD}
    expected = [dense(add(server, update), config) for update in updates]
    mean = {key: (expected[0][key] + 2 * expected[1][key] + 3 * expected[2][key]) / 6 for key in expected[0]}
    assert_same(total(add(server, result.delta), result.residual, config), mean)


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


# Mixed ranks


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 32), st.integers(1, 32), st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_client_of_lower_rank_holds_part_of_the_servers_product(rank, alpha, theirs, rslora, their_rslora, seed):
    config, client = make_config(4, alpha, rslora), make_config(rank, theirs, their_rslora)
    server = make_adapter(seed, 4)
    small = truncate_adapter(server, config, client)
    back = pad_update(small, server, config, client)
    assert_same(dense(small, client), dense(back, config))
    for module, target in lora_factors(server, config).items():
        torch.testing.assert_close(back[target.key_a][:rank], server[target.key_a][:rank])
        torch.testing.assert_close(back[target.key_b][:, :rank], server[target.key_b][:, :rank])
        assert not back[target.key_a][rank:].any() and not back[target.key_b][:, rank:].any(), module
    if rank == 4:
        assert_same(dense(small, client), dense(server, config))


def test_exact_products_stay_exact_with_mixed_ranks():
    config, server = make_config(4), make_adapter(0, 4)
    proxy = coarse(server)
    old, expected, updates = dense(server, config), dense(server, config), []
    for seed, (rank, rslora) in enumerate([(4, False), (2, True), (1, False)], 1):
        client = make_config(rank, 8 * seed, rslora)
        start, delta = truncate_adapter(proxy, config, client), make_adapter(seed, rank, 0.3)
        before, after = dense(start, client), dense(add(start, delta), client)
        expected = {key: expected[key] + (after[key] - before[key]) / 3 for key in old}
        updates.append(pad_update(delta, server, config, client))
    new, result = run_exact(server, proxy, updates, [1.0] * 3, config, mixed_ranks=True)
    assert_same(total(new, result.residual, config), expected, 1e-3)


def test_exact_knows_that_clients_started_at_different_proxies():
    config, server = make_config(4), make_adapter(0, 4)
    proxies, updates, expected = [], [], dense(server, config)
    for rank in (4, 2, 4):
        client = make_config(rank)
        # Quantized after it was cut: other blocks, other scales than the first columns of the whole proxy.
        start, delta = coarse(truncate_adapter(server, config, client)), make_adapter(rank, rank, 0.3)
        step = dense(add(start, delta), client)
        before = dense(start, client)
        expected = {key: expected[key] + (step[key] - before[key]) / 3 for key in expected}
        proxies.append(pad_update(start, server, config, client))
        updates.append(pad_update(delta, server, config, client))
    new, result = run_exact(server, proxies, updates, [1.0] * 3, config)
    assert_same(total(new, result.residual, config), expected, 1e-3)


def test_ordered_factors_truncate_best():
    config, server = make_config(4), make_adapter(0, 4)
    new, _ = run_exact(server, server, [make_adapter(1, 4)], [1.0], config, mixed_ranks=True)
    client = make_config(2)
    part = dense(truncate_adapter(new, config, client), client)["q"]
    whole = dense(new, config)["q"]
    assert float((whole - part).norm()) == pytest.approx(float(torch.linalg.svdvals(whole)[2:].norm()), rel=1e-4)


def test_ranks_that_do_not_fit_are_refused():
    server = make_adapter(0, 2)
    with pytest.raises(ValueError, match="at most the server's"):
        truncate_adapter(server, make_config(2), make_config(3))
    with pytest.raises(ValueError, match="a client of rank 1"):
        pad_update(server, server, make_config(2), make_config(1))


# Which factors train


def test_freeze_a_and_alternate_send_and_move_one_factor():
    config, server = make_config(4), make_adapter(0, 4)
    for rule, number, moved in (
        ("freeze_a", 1, "_B"),
        ("freeze_a", 2, "_B"),
        ("alternate", 1, "_B"),
        ("alternate", 2, "_A"),
    ):
        keys = trainable_keys(rule, number, server)
        assert HEAD in keys and all(key == HEAD or moved in key for key in keys)
        assert len(keys) == 5
        updates = [{key: make_adapter(k, 4)[key] for key in keys} for k in (1, 2, 3)]
        result = aggregate(
            rule, updates, [1.0, 2.0, 3.0], adapter=server, proxy=server, peft_config=config, round_number=number
        )
        # Exact: with one factor common to all, the product of the mean is the mean of the products.
        clients = [dense(add(server, update), config) for update in updates]
        mean = {key: (clients[0][key] + 2 * clients[1][key] + 3 * clients[2][key]) / 6 for key in clients[0]}
        assert_same(dense(add(server, result.delta), config), mean)
        with pytest.raises(ValueError, match="unknown"):
            aggregate(rule, [server], [1.0], adapter=server, proxy=server, peft_config=config, round_number=number)


# Every rule at once

clients_of_a_round = st.lists(
    st.tuples(st.floats(0.01, 1e6), st.integers(1, 4), st.integers(1, 64), st.booleans()), min_size=1, max_size=5
)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(RULES),
    clients_of_a_round,
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.randoms(use_true_random=False),
)
def test_every_rule_is_the_dense_mean_of_its_kind(rule, clients, number, rslora, dtype, chance):
    """Clients of any rank, α and kind of scale, in any dtype; permuted, with weights of another scale, and repeated."""
    config = make_config(4, 16, rslora)
    server = make_adapter(0, 4, 0.5)
    proxies, updates, dense_steps = [], [], []
    keys = trainable_keys(rule, number, server)
    for seed, (_, rank, alpha, their_rslora) in enumerate(clients, 1):
        client = make_config(rank, alpha, their_rslora)
        start = truncate_adapter(server, config, client)
        delta = {key: make_adapter(seed, rank, 0.3)[key].to(dtype) for key in keys}
        before, after = dense(start, client), dense(add(start, delta), client)
        dense_steps.append({key: after[key] - before[key] for key in before})
        proxies.append(pad_update(start, server, config, client))
        updates.append(pad_update(delta, server, config, client))
    weights = [weight for weight, *_ in clients]

    def run(places, factor=1.0):
        return aggregate(
            rule,
            [updates[place] for place in places],
            [factor * weights[place] for place in places],
            adapter=server,
            proxy=[proxies[place] for place in places],
            peft_config=config,
            round_number=number,
        )

    def stands_for(result):
        return total(add(server, result.delta), result.residual, config)

    places = list(range(len(clients)))
    result = run(places)
    shares = normalize_weights(weights)
    if rule == "fedavg":  # the factors' mean, which is not the products'
        for key in keys:
            mean = sum(p * update[key].double() for p, update in zip(shares, updates, strict=True))
            torch.testing.assert_close(result.delta[key].double(), mean, rtol=1e-5, atol=1e-6)
    elif rule in ("exact", "stack") or all(rank == 4 for _, rank, *_ in clients):
        old = dense(server, config)
        expected = {
            key: old[key] + sum(p * step[key] for p, step in zip(shares, dense_steps, strict=True)) for key in old
        }
        assert_same(stands_for(result), expected, 2e-3)
    chance.shuffle(places)
    for other in (run(places), run(places, 3e-4), run(places * 2)):
        assert_same(stands_for(other), stands_for(result), 2e-3)


# Robust rules: a cloud of honest clients, and as many attackers as each rule withstands


def make_cloud(attack: str, honest: int, attackers: int) -> tuple[list[dict], list[dict]]:
    g = torch.Generator().manual_seed(0)
    truth = torch.ones(300)
    good = [{"w": truth + torch.randn(300, generator=g)} for _ in range(honest)]
    rows = torch.stack([update["w"] for update in good])
    bad = {
        "sign_flip": -10 * rows.mean(0),
        "scaling": 1e6 * torch.randn(300, generator=g),
        "little_is_enough": rows.mean(0) - 1.5 * rows.std(0),
    }[attack]
    return good, [{"w": bad}] * attackers


@pytest.mark.parametrize("attack", ["sign_flip", "scaling", "little_is_enough"])
@pytest.mark.parametrize(
    ("robust", "attackers"),
    [
        ("median", 5),
        ("trimmed_mean", 5),
        ("krum", 4),
        ("multi_krum", 4),
        ("geometric_median", 5),
        ("norm_clipping", 2),
    ],
)
def test_robust_rules_withstand_their_attackers(robust, attackers, attack):
    good, bad = make_cloud(attack, 11 - attackers, attackers)
    result = aggregate(
        "fedavg",
        bad + good,
        [1.0] * 11,
        adapter=good[0],
        proxy=good[0],
        peft_config=make_config(1),
        robust=robust,
        num_attackers=attackers,
    )
    rows = torch.stack([update["w"] for update in good])
    error = float((result.delta["w"] - rows.mean(0)).norm())
    # As far from the honest mean as honest clients may be, whatever the attackers' size.
    spread = float((rows - rows.mean(0)).norm(dim=1).max())
    assert error < 2 * spread
    if attack == "scaling":
        assert float((average_updates(bad + good, [1.0] * 11)["w"] - rows.mean(0)).norm()) > 100 * spread


@pytest.mark.parametrize("robust", ["median", "geometric_median"])
def test_one_attacker_more_than_half_breaks_them(robust):
    good, bad = make_cloud("scaling", 5, 6)
    updates, config = bad + good, make_config(1)
    result = aggregate(
        "fedavg", updates, [1.0] * 11, adapter=good[0], proxy=good[0], peft_config=config, robust=robust
    )
    assert float(result.delta["w"].norm()) > 1e5


def test_krum_picks_an_honest_client_and_multi_krum_drops_the_attackers():
    good, bad = make_cloud("sign_flip", 7, 4)
    gram = gram_matrix(bad + good)
    assert sum(krum_weights(gram, 4)[4:]) == 1
    assert krum_weights(gram, 4, 7) == [0.0] * 4 + [1.0] * 7


def test_krum_scores_are_the_papers():
    good, bad = make_cloud("sign_flip", 5, 2)
    rows = torch.stack([update["w"] for update in bad + good]).double()
    scores = [sum(sorted(float((rows[i] - rows[j]).square().sum()) for j in range(7) if j != i)[:3]) for i in range(7)]
    assert krum_weights(gram_matrix(bad + good), 2).index(1.0) == scores.index(min(scores))


def test_geometric_median_has_no_descent_left():
    good, bad = make_cloud("sign_flip", 6, 3)
    updates, shares = bad + good, [0.2, 0.1, 0.05, 0.15, 0.1, 0.1, 0.1, 0.1, 0.1]
    weights = geometric_median_weights(gram_matrix(updates), shares)
    rows = torch.stack([update["w"] for update in updates]).double()
    point = (torch.tensor(weights, dtype=torch.float64) @ rows).requires_grad_()
    (torch.tensor(shares, dtype=torch.float64) * (rows - point).norm(dim=1)).sum().backward()
    assert float(point.grad.norm()) < 1e-6


def test_geometric_median_of_equal_updates_is_finite():
    for size in (0.0, 1.0):
        weights = geometric_median_weights(gram_matrix([{"w": torch.full((3,), size)}] * 4), [1.0] * 4)
        assert weights == pytest.approx([0.25] * 4)


def test_clipping_brings_every_norm_to_the_median():
    updates = [{"w": torch.full((4,), float(k))} for k in (1, 2, 3, 4, 1000)]
    assert norm_clipping_scales(gram_matrix(updates)) == pytest.approx([1, 1, 1, 3 / 4, 3 / 1000])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 99))
def test_coordinate_rules_are_the_dense_ones(count, seed):
    updates = [make_adapter(seed + k, 2) for k in range(count)]
    median = coordinate_median(updates)
    for key, tensor in median.items():
        rows = torch.stack([update[key] for update in updates]).double()
        torch.testing.assert_close(tensor.double(), rows.quantile(0.5, dim=0))
        for trim in range((count + 1) // 2):
            ordered = rows.sort(0).values[trim : count - trim].mean(0)
            torch.testing.assert_close(trimmed_mean(updates, trim)[key].double(), ordered)


def test_pieces_of_a_tensor_are_put_together(monkeypatch):
    updates = [make_adapter(k, 2) for k in range(5)]
    whole, gram = coordinate_median(updates), gram_matrix(updates)
    monkeypatch.setattr("fedlpp_hf.aggregation.robust._CHUNK_VALUES", 35)
    monkeypatch.setattr("fedlpp_hf.aggregation.rules._CHUNK", 7)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in coordinate_median(updates).items())
    torch.testing.assert_close(gram_matrix(updates), gram)
    mean = average_updates(updates, [1.0] * 5)
    for key in mean:
        torch.testing.assert_close(mean[key], torch.stack([update[key] for update in updates]).mean(0))


def test_too_many_attackers_are_refused():
    updates = [make_adapter(k, 2) for k in range(4)]
    with pytest.raises(ValueError, match="needs 5 updates"):
        trimmed_mean(updates, 2)
    with pytest.raises(ValueError, match="needs 5 updates"):
        krum_weights(gram_matrix(updates), 1)


# What goes together


@pytest.mark.parametrize(
    ("rule", "options", "reason"),
    [
        ("mean", {}, "expected one of fedavg"),
        ("fedavg", {"robust": "bulyan"}, "expected one of none"),
        ("exact", {"server_optimizer": "adam"}, "server optimizer"),
        ("exact", {"server_momentum": 0.9}, "server optimizer"),
        ("exact", {"server_learning_rate": 0.5}, "server optimizer"),
        ("exact", {"broadcast": "never"}, "factor by factor"),
        ("exact", {"secure_aggregation": True}, "masked"),
        ("exact", {"robust": "median", "weighting": "uniform"}, "nobody's"),
        ("exact", {"peft_config": make_config(2, use_dora=True)}, "DoRA"),
        ("stack", {}, "every client's own factors"),
        ("stack", {"broadcast": "never", "num_rounds": 2}, "every client's own factors"),
        ("stack", {"broadcast": "never", "fit_server_step": True}, "fit_server_step"),
        ("alternate", {"broadcast": "3"}, "different factors"),
        ("fedavg", {"robust": "median", "secure_aggregation": True}, "nothing but the sum"),
        ("fedavg", {"robust": "median"}, "an attacker would say many"),
        ("fedavg", {"robust": "krum", "weighting": "uniform"}, "how many attackers"),
        ("fedavg", {"num_attackers": -1}, "how many attackers"),
        (
            "fedavg",
            {"robust": "krum", "weighting": "uniform", "num_attackers": 2, "clients_per_round": 6},
            "needs 7 clients",
        ),
        (
            "fedavg",
            {"robust": "trimmed_mean", "weighting": "uniform", "num_attackers": 2, "min_clients": 4},
            "needs 5 clients.*min_clients",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(rule, options, reason):
    with pytest.raises(ValueError, match=reason):
        check_rule(rule, **options)


def test_what_goes_together_passes():
    for rule in RULES:
        check_rule(rule, broadcast="never" if rule == "stack" else "every_round")
    check_rule("freeze_a", secure_aggregation=True, server_optimizer="adam", broadcast="never", num_rounds=9)
    check_rule("exact", robust="krum", num_attackers=1, clients_per_round=5, weighting="uniform")


def test_no_updates_are_refused():
    with pytest.raises(ValueError, match="no updates"):
        aggregate("fedavg", [], [], adapter={}, proxy={}, peft_config=make_config(1))


# What clients add


def test_proximal_gradient_is_that_of_the_term():
    start = {"w": torch.randn(5), "frozen": torch.randn(2)}
    w = torch.nn.Parameter(torch.randn(5))
    frozen = torch.nn.Parameter(torch.randn(2))
    (w.square().sum() + 0.3 / 2 * (w - start["w"]).square().sum()).backward()
    expected, w.grad = w.grad, None
    w.square().sum().backward()
    add_proximal_gradient_({"w": w, "frozen": frozen}, start, 0.3)
    torch.testing.assert_close(w.grad, expected)
    assert frozen.grad is None


def test_scaffold_removes_the_drift_of_clients_that_differ():
    targets = [torch.tensor([4.0, 0.0]), torch.tensor([0.0, 1.0])]
    curvatures = [torch.tensor([1.0, 0.1]), torch.tensor([0.1, 1.0])]
    optimum = sum(c * t for c, t in zip(curvatures, targets, strict=True)) / sum(curvatures)
    lr, steps, errors = 0.3, 10, {}
    for scaffold in (False, True):
        theta, server = torch.zeros(2), {}
        clients = [{}, {}]
        for _ in range(200):
            deltas = []
            for k in range(2):
                w = torch.nn.Parameter(theta.clone())
                for _ in range(steps):
                    w.grad = curvatures[k] * (w.detach() - targets[k])
                    if scaffold:
                        add_control_gradient_({"w": w}, server, clients[k])
                    w.data -= lr * w.grad
                deltas.append({"w": w.detach() - theta})
            old = server
            mean = average_updates(deltas, [1.0, 1.0])
            server = update_server_control(old, mean, steps, lr, 1.0)
            clients = [update_client_control(clients[k], old, deltas[k], steps, lr) for k in range(2)]
            # The server's control is the mean of the clients', though it never sees them.
            torch.testing.assert_close(server["w"], (clients[0]["w"] + clients[1]["w"]) / 2, rtol=1e-4, atol=1e-5)
            theta = theta + mean["w"]
        errors[scaffold] = float((theta - optimum).norm())
    assert errors[True] < 1e-3 < 0.1 < errors[False]


def test_clipping_and_its_check_agree():
    update = make_adapter(0, 2)
    norm = update_norm(update)
    flat = torch.cat([tensor.flatten().double() for tensor in update.values()])
    assert norm == pytest.approx(float(flat.norm()))
    clipped, had = clip_update(update, norm / 3)
    assert had == norm and update_norm(clipped) == pytest.approx(norm / 3)
    check_norm(clipped, norm / 2)
    with pytest.raises(ValueError, match="at most"):
        check_norm(update, norm / 2)
    with pytest.raises(ValueError, match="at most"):
        check_norm({"w": torch.tensor([float("nan")])}, 1.0)
    same, _ = clip_update(update, 2 * norm)
    assert all(torch.equal(same[key], update[key]) for key in update)
