# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Every rule is the dense mean of its kind, and every robust rule withstands the attackers that it says it does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlpp_hf.aggregation.mean import average_updates, normalize_weights
from fedlpp_hf.aggregation.rules import aggregate
from fedlpp_hf.config.rules import RULES, trainable_keys

from .dense import HEAD, add, assert_close, dense, make_adapter, make_config, make_round, total


def test_freeze_a_sends_and_moves_one_factor():
    config, server = make_config(4), make_adapter(0, 4)
    keys = trainable_keys("freeze_a", server)
    assert HEAD in keys and all(key == HEAD or "_B" in key for key in keys)
    assert len(keys) == 5
    updates = [{key: make_adapter(k, 4)[key] for key in keys} for k in (1, 2, 3)]
    result = aggregate("freeze_a", make_round(updates, [1.0, 2.0, 3.0], server, config=config))
    # Exact: with one factor common to all, the product of the mean is the mean of the products.
    clients = [dense(add(server, update), config) for update in updates]
    mean = {key: (clients[0][key] + 2 * clients[1][key] + 3 * clients[2][key]) / 6 for key in clients[0]}
    assert_close(dense(add(server, result.delta), config), mean)
    with pytest.raises(ValueError, match="unknown"):
        aggregate("freeze_a", make_round([server], config=config))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(RULES)),
    st.lists(st.floats(0.01, 1e6), min_size=1, max_size=5),
    st.integers(1, 64),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.randoms(use_true_random=False),
)
def test_every_rule_is_the_dense_mean_of_its_kind(rule, weights, alpha, rslora, dtype, chance):
    """Of any α and kind of scale, in any dtype; permuted, with weights of another scale, and repeated."""
    config = make_config(4, alpha, rslora)
    server = make_adapter(0, 4, 0.5)
    keys = trainable_keys(rule, server)
    updates = [{key: make_adapter(seed, 4, 0.3)[key].to(dtype) for key in keys} for seed in range(1, len(weights) + 1)]

    def run(places, factor=1.0):
        deltas = [updates[place] for place in places]
        return aggregate(
            rule, make_round(deltas, [factor * weights[place] for place in places], server, config=config)
        )

    def stands_for(result):
        return total(add(server, result.delta), result.residual, config)

    places = list(range(len(weights)))
    result = run(places)
    shares = normalize_weights(weights)
    if rule == "fedavg":  # the factors' mean, which is not the products'
        for key in keys:
            mean = sum(p * update[key].double() for p, update in zip(shares, updates, strict=True))
            torch.testing.assert_close(result.delta[key].double(), mean, rtol=1e-5, atol=1e-6)
    else:
        clients = [dense(add(server, update), config) for update in updates]
        expected = {
            key: sum(p * client[key] for p, client in zip(shares, clients, strict=True))
            for key in dense(server, config)
        }
        assert_close(stands_for(result), expected, 2e-3)
    chance.shuffle(places)
    for other in (run(places), run(places, 3e-4), run(places * 2)):
        assert_close(stands_for(other), stands_for(result), 2e-3)


def test_a_scale_multiplies_the_step_of_the_product_and_not_what_was_before():
    config, server = make_config(4), make_adapter(0, 4)
    updates = [make_adapter(k, 4, 0.3) for k in (1, 2, 3)]
    plain, scaled = (
        aggregate("exact", make_round(updates, [1.0, 2.0, 3.0], server, config=config, scale=scale))
        for scale in (1.0, 1.5)
    )
    before = dense(server, config)
    one, other = (total(add(server, result.delta), result.residual, config) for result in (plain, scaled))
    assert_close(other, {key: before[key] + 1.5 * (one[key] - before[key]) for key in before}, 2e-3)


def test_an_offset_is_taken_from_every_update_before_products_are_averaged():
    config, server = make_config(4), make_adapter(0, 4)
    updates, offset = [make_adapter(k, 4, 0.3) for k in (1, 2, 3)], make_adapter(4, 4, 0.2)
    less = [{key: value - offset[key] for key, value in update.items()} for update in updates]
    options = {"weights": [1.0, 2.0, 3.0], "adapter": server, "config": config, "scale": 1.5}
    result = aggregate("exact", make_round(updates, offset=offset, **options))
    plain = aggregate("exact", make_round(less, **options))
    assert_close(
        total(add(server, result.delta), result.residual, config),
        total(add(server, plain.delta), plain.residual, config),
    )


def test_no_updates_are_refused():
    with pytest.raises(ValueError, match="no updates"):
        aggregate("fedavg", make_round([], adapter={}))


# Robust rules: a cloud of honest clients, and as many attackers as each rule withstands.


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
@pytest.mark.parametrize(("robust", "attackers"), [("median", 5), ("trimmed_mean", 5), ("multi_krum", 4)])
def test_robust_rules_withstand_their_attackers(robust, attackers, attack):
    good, bad = make_cloud(attack, 11 - attackers, attackers)
    result = aggregate("fedavg", make_round(bad + good, num_attackers=attackers), robust)
    rows = torch.stack([update["w"] for update in good])
    error = float((result.delta["w"] - rows.mean(0)).norm())
    # As far from the honest mean as honest clients may be, whatever the attackers' size.
    spread = float((rows - rows.mean(0)).norm(dim=1).max())
    assert error < 2 * spread
    if attack == "scaling":
        assert float((average_updates(bad + good, [1.0] * 11)["w"] - rows.mean(0)).norm()) > 100 * spread


def test_one_attacker_more_than_half_breaks_the_median():
    good, bad = make_cloud("scaling", 5, 6)
    result = aggregate("fedavg", make_round(bad + good), "median")
    assert float(result.delta["w"].norm()) > 1e5


def test_multi_krum_drops_the_attackers_and_reports_its_weights():
    good, bad = make_cloud("sign_flip", 7, 4)
    result = aggregate("fedavg", make_round(bad + good, num_attackers=4), "multi_krum")
    assert result.report["client_weights"] == pytest.approx([0.0] * 4 + [1 / 7] * 7)
    torch.testing.assert_close(result.delta["w"], average_updates(good, [1.0] * 7)["w"])


def test_multi_krum_chooses_clients_and_exact_averages_their_products():
    config, server = make_config(4), make_adapter(0, 4)
    good = [make_adapter(k, 4, 0.3) for k in range(1, 7)]
    bad = [make_adapter(k, 4, 100.0) for k in (98, 99)]
    robust = aggregate("exact", make_round(bad + good, adapter=server, config=config, num_attackers=2), "multi_krum")
    plain = aggregate("exact", make_round(good, adapter=server, config=config))
    assert_close(
        total(add(server, robust.delta), robust.residual, config),
        total(add(server, plain.delta), plain.residual, config),
    )
