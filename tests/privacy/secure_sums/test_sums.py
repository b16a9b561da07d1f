# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Secure sums are plain sums to within the fixed point, whoever drops out when; below the threshold nothing is opened."""

import numpy as np
import pytest

from fedlpp_hf.privacy.secure_sums.fixed_point import Contribution, decode_sum, encode_contribution
from fedlpp_hf.privacy.secure_sums.terms import MOST_MEMBERS, compute_threshold
from tests.privacy.secure_sums.parties import make_clients, make_terms, make_values, name_clients, reach, run


pytest.importorskip("Crypto", reason="needs the extra [privacy]")

STEPS = ("keys", "roster", "shares", "survivors", "opening")


def find_bound(terms, members):
    """Half a step of the fixed point, and half a unit in the last place of float32."""
    return terms.resolution(members) / 2 + terms.bound * 2**-24


@pytest.mark.parametrize("count", [3, 4, 10, pytest.param(50, marks=pytest.mark.slow)])
def test_sum_is_the_plain_one(count):
    terms = make_terms(1000, share=2 / 3, bound=0.5)
    clients, values = make_clients(terms, count)
    found, failures = run(terms, clients)
    assert not failures and found.clients == tuple(name_clients(count))
    expected = values.astype(np.float64).mean(axis=0)
    assert np.abs(found.opened.mean - expected).max() <= find_bound(terms, count)
    assert (found.members, found.threshold) == (count, 2 * count // 3 + 1)
    assert found.opened.steps == count * (count + 1) // 2
    assert found.opened.loss == pytest.approx((count - 1) / 2, abs=1e-4) and found.opened.losses == count


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", [1, 2])
def test_clients_drop_out_at_any_step(step, number):
    """Of five, with a threshold of three, two may leave; who has sent its masked update is in the sum."""
    terms = make_terms(200)
    clients, values = make_clients(terms, 5)
    gone = name_clients(5)[1 : 1 + number]
    found, failures = run(terms, clients, lost=[(step, client) for client in gone])
    left = [client for client in name_clients(5) if client not in gone or step in ("survivors", "opening")]
    assert list(found.clients) == left and failures == {client: "lost" for client in clients if client not in left}
    expected = values[[int(client[-2:]) for client in left]].astype(np.float64).mean(axis=0)
    assert np.abs(found.opened.mean - expected).max() <= find_bound(terms, found.members)


def test_clients_drop_out_at_every_step_of_one_round():
    terms = make_terms(200)
    clients, values = make_clients(terms, 11)
    names = name_clients(11)
    lost = list(zip(STEPS, names, strict=False))
    found, failures = run(terms, clients, lost=lost)
    assert (found.members, found.threshold) == (10, 6)
    assert list(found.clients) == names[3:] and set(failures) == set(names[:3])
    assert np.abs(found.opened.mean - values[3:].astype(np.float64).mean(axis=0)).max() <= find_bound(terms, 10)


@pytest.mark.parametrize("step", STEPS)
def test_below_the_threshold_nothing_is_opened(step, monkeypatch):
    # Not one secret is put together: of the sum and of the updates the server has as much as of noise.
    monkeypatch.setattr("fedlpp_hf.privacy.secure_sums.server.combine_shares", None)
    clients, _ = make_clients(make_terms(), 5)
    found, failures = run(make_terms(), clients, lost=[(step, client) for client in name_clients(5)[:3]])
    assert found is None and len(failures) == 5
    reasons = {
        "keys": "2 clients are ready, and a sum needs 3",
        "roster": "2 of 5 clients sent their sealed shares, and the sum needs 3",
        "shares": "2 of 5 clients sent their masked update, and the sum needs 3",
        "survivors": "2 of 5 clients sent their confirmation, and the sum needs 3",
        "opening": "2 of 5 clients sent their shares, and the sum needs 3",
    }
    assert failures["site-04"] == f"the sum was not opened: {reasons[step]}"


def test_shares_below_the_threshold_tell_nothing():
    """With one share less than the threshold, what a server puts together is no secret of anybody."""
    server, clients, _, requests = reach("opening", 5)
    for name in name_clients(5)[:2]:
        server.add_shares(name, clients[name].answer("opening", requests[name]))
    server.roster.__dict__["threshold"] = 2  # it does not wait
    with pytest.raises(ValueError, match="the shares of the own mask of client 'site-00' do not fit"):
        server.open()


def test_round_closes_when_enough_are_ready():
    clients, values = make_clients(make_terms(), 6)
    found, failures = run(make_terms(), clients, wanted=4)
    assert found.clients == tuple(name_clients(4))
    assert failures == dict.fromkeys(name_clients(6)[4:], "the round closed without it")
    assert np.abs(found.opened.mean - values[:4].mean(axis=0)).max() < 1e-6


def test_second_answer_of_a_client_changes_nothing():
    server, clients, values, requests = reach("shares")
    for name, request in requests.items():
        answer = clients[name].answer("shares", request)
        server.add_masked(name, answer)
        with pytest.raises(ValueError, match="it answered twice"):
            server.add_masked(name, answer)
    for add, make, step in (
        (server.add_confirmation, server.make_survivors, "survivors"),
        (server.add_shares, server.make_openings, "opening"),
    ):
        for name, request in make().items():
            add(name, clients[name].answer(step, request))
            with pytest.raises(ValueError, match="it answered twice"):
                add(name, clients[name].answer(step, request))
    assert np.abs(server.open().mean - values.mean(axis=0)).max() < 1e-6


def test_answers_after_the_phase_are_refused():
    server, clients, _, requests = reach("shares")
    late = clients["site-00"].answer("shares", requests["site-00"])
    for name in name_clients(4)[1:]:
        server.add_masked(name, clients[name].answer("shares", requests[name]))
    server.make_survivors()
    with pytest.raises(ValueError, match="sent its masked update in the phase of the confirmation"):
        server.add_masked("site-00", late)
    with pytest.raises(ValueError, match="it was not asked for its confirmation"):
        server.add_confirmation("site-00", late)


class TestFixedPoint:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([0.0, 1.1, 0.0], "a value of magnitude 1.1; the sum holds up to 1, which clip_update_norm sets"),
            ([0.0, -1.1, 0.0], "a value of magnitude 1.1"),
            ([0.0, np.nan, 0.0], "NaN or infinite"),
            ([0.0, np.inf, 0.0], "NaN or infinite"),
            ([0.0, 0.0], "the update has 2 values; the sum has 3"),
        ],
        ids=str,
    )
    def test_what_could_overflow_is_an_error(self, values, message):
        contribution = Contribution(np.array(values, np.float32), 1.0, 1)
        with pytest.raises(ValueError, match=message):
            encode_contribution(contribution, make_terms(3), 3)

    def test_norm_is_checked_where_only_the_client_can(self):
        terms = make_terms(3, max_norm=1.0)
        encode_contribution(Contribution(np.array([0.6, 0.8, 0.0], np.float32), 1.0, 1), terms, 3)
        with pytest.raises(ValueError, match="norm is 1.131; at most 1 may be added"):
            encode_contribution(Contribution(np.array([0.8, 0.8, 0.0], np.float32), 1.0, 1), terms, 3)

    @pytest.mark.parametrize("members", [3, 7, MOST_MEMBERS])
    @pytest.mark.parametrize("sign", [-1, 1])
    def test_extremes_do_not_overflow(self, members, sign):
        terms = make_terms(4, bound=0.3)
        values = np.full(4, sign * 0.3, np.float32)
        words = encode_contribution(Contribution(values, sign * 1000.0, terms.levels(members)), terms, members)
        total = sum(int(word) for word in words.view(np.int32)[:1]) * members
        assert abs(total) <= (1 << 30) * (1 + 1e-6)  # the float32 next to 0.3 is larger
        opened = decode_sum((words * np.uint32(members)).astype(np.uint32), terms, members, members)
        assert np.abs(opened.mean - values).max() <= find_bound(terms, members)
        assert opened.loss == pytest.approx(sign * 1000.0, rel=1e-5)
        assert opened.steps == members * terms.levels(members)

    @pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1001.0])
    def test_loss_that_is_none_is_left_out_and_counted(self, loss):
        terms = make_terms(1)
        one, other = (
            encode_contribution(Contribution(np.zeros(1, np.float32), given, 2), terms, 3) for given in (loss, 3.0)
        )
        opened = decode_sum(one + other, terms, 3, 2)
        assert (opened.losses, opened.steps) == (1, 4) and opened.loss == pytest.approx(3.0, abs=1e-5)
        assert np.isnan(decode_sum(one, terms, 3, 1).loss)

    def test_sum_that_is_still_masked_is_found_out(self):
        words = np.random.default_rng(0).integers(0, 2**32, 103, np.uint32)
        with pytest.raises(ValueError, match="the sum is out of range"):
            decode_sum(words, make_terms(100), 3, 3)

    @pytest.mark.parametrize("count", [3, 100, 1000])
    def test_error_is_half_a_step_at_most(self, count):
        terms = make_terms(1000)
        values = make_values(1, 1000)[0]
        words = encode_contribution(Contribution(values, 0.0, 0), terms, count)
        back = words.view(np.int32)[:1000] * terms.resolution(count)
        assert np.abs(back - values).max() <= terms.resolution(count) / 2 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("share", "members", "threshold"),
    [(0.5, 3, 2), (0.5, 4, 3), (0.5, 100, 51), (2 / 3, 3, 3), (2 / 3, 9, 7), (2 / 3, 300, 201), (0.9, 10, 10)],
)
def test_threshold_is_more_than_the_share(share, members, threshold):
    assert compute_threshold(share, members) == threshold
    assert threshold > members / 2
