# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Malformed messages of either side are refused, and never raise anything else than the error that refuses them."""

import random

import numpy as np
import pytest

from fedlpp_hf.privacy.secure_sums.client import RefusedError, SumClient
from fedlpp_hf.privacy.secure_sums.fixed_point import Contribution
from fedlpp_hf.privacy.secure_sums.messages import limit_masked, limit_members, write_message
from fedlpp_hf.privacy.secure_sums.primitives import make_context
from tests.privacy.secure_sums.parties import TASK, make_terms, name_clients, reach, start


pytest.importorskip("Crypto", reason="needs the extra [privacy]")
hypothesis = pytest.importorskip("hypothesis", reason="needs the extra [test]")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


FAST = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
STEPS = {"roster": "roster", "shares": "deliveries", "survivors": "survivors", "opening": "opening"}
ADDED = {"roster": "sealed shares", "survivors": "confirmation", "opening": "shares"}


@pytest.mark.parametrize("step", STEPS)
@FAST
@given(data=st.data())
def test_client_refuses_forged_requests(step, data):
    server, clients, _, requests = start() if step == "roster" else reach(step)
    fields = {"roster": server.roster.digest, "survivors": name_clients(4), "sealed": {}, "signatures": {}}
    fields |= {"threshold": 3, "bound": 1.0, "size": 20, "task": TASK, "members": {}}
    names = {
        "roster": ("threshold", "bound", "size", "task", "members"),
        "shares": ("roster", "sealed"),
        "survivors": ("roster", "survivors"),
        "opening": ("roster", "survivors", "signatures"),
    }[step]
    forged = data.draw(st.sampled_from(names))
    request = {name: fields[name] for name in names} | {forged: data.draw(VALUES)}
    try:
        message = write_message(STEPS[step], server.terms, request)
    except (ValueError, OverflowError, UnicodeEncodeError):
        return
    if message == requests["site-00"]:
        return
    with pytest.raises(RefusedError):
        clients["site-00"].answer(step, message)


@pytest.mark.parametrize("step", ADDED)
@FAST
@given(data=st.data())
def test_server_refuses_forged_answers(step, data):
    server, clients, _, requests = start() if step == "roster" else reach(step)
    add = {"roster": server.add_sealed, "survivors": server.add_confirmation, "opening": server.add_shares}[step]
    own = {"client_id": "site-00", "roster": server.roster.digest}
    others = {"roster": {"sealed": {}}, "survivors": {"survivors": "0" * 64, "signature": ""}}
    fields = own | others.get(step, {"survivors": "0" * 64, "shares": {}})
    try:
        message = write_message(
            ADDED[step], server.terms, fields | {data.draw(st.sampled_from(sorted(fields))): data.draw(VALUES)}
        )
    except (ValueError, OverflowError, UnicodeEncodeError):
        return
    with pytest.raises(ValueError):
        add("site-00", message)
    add("site-00", clients["site-00"].answer(step, requests["site-00"]))  # an intact one is taken afterwards


@pytest.mark.parametrize("step", ["keys", *STEPS])
def test_damaged_bytes_are_refused(step):
    """Cut, longer, or with a bit turned round at a random place: on both sides."""
    generator = random.Random(0)
    for _ in range(10):
        server, clients, _, requests = start() if step in ("keys", "roster") else reach(step)
        client = clients["site-00"]
        good = client.advertise() if step == "keys" else client.answer(step, requests["site-00"])
        add = {
            "keys": server.add_keys,
            "roster": server.add_sealed,
            "shares": server.add_masked,
            "survivors": server.add_confirmation,
            "opening": server.add_shares,
        }[step]
        bad = damage(good, generator)
        with pytest.raises(ValueError):
            add("site-00", bad)
        if step == "keys":
            continue
        server, clients, _, requests = start() if step == "roster" else reach(step)
        with pytest.raises(RefusedError):
            clients["site-00"].answer(step, damage(requests["site-00"], generator))


def damage(data, generator):
    kind = generator.choice(["cut", "longer", "bit"])
    if kind == "cut":
        return data[: generator.randrange(len(data))]
    if kind == "longer":
        return data + b"\0"
    changed = bytearray(data)
    # Not the spaces that safetensors fills its header up with: they mean nothing.
    place = generator.choice([place for place, byte in enumerate(data) if byte != 0x20])
    changed[place] ^= 1 << generator.randrange(8)
    return bytes(changed)


def test_long_messages_are_refused_by_their_length():
    server, _, _, _ = start()
    with pytest.raises(ValueError, match="expected at most"):
        server.add_sealed("site-00", bytes(limit_members(4).num_bytes + 1))
    server, _, _, _ = reach("shares")
    with pytest.raises(ValueError, match="expected at most"):
        server.add_masked("site-00", bytes(limit_masked(23).num_bytes + 1))


@pytest.mark.parametrize("count", [22, 24])
def test_masked_update_of_another_size_is_refused(count):
    server, _, _, _ = reach("shares")
    fields = {"client_id": "site-00", "roster": server.roster.digest}
    with pytest.raises(ValueError, match="other words than 23 of 4 bytes"):
        server.add_masked("site-00", write_message("masked update", server.terms, fields, np.zeros(count, np.uint32)))


def test_answer_in_another_clients_name_is_refused():
    server, clients, _, requests = start()
    with pytest.raises(ValueError, match="it answered as client 'site-01'"):
        server.add_sealed("site-00", clients["site-01"].answer("roster", requests["site-01"]))


def test_ids_of_any_text_fit_into_the_limits():
    """A thousand characters, each of which is written in twelve bytes, and escaped once more."""
    terms = make_terms(5)
    names = ["\U0001f98e" * 999 + str(number) for number in range(3)]
    clients = {name: SumClient(terms, name, Contribution(np.zeros(5, np.float32), 1.0, 1)) for name in names}
    from tests.privacy.secure_sums.parties import run

    found, failures = run(terms, clients)
    assert not failures and len(found.clients) == 3


def test_purposes_are_never_the_same():
    """Keys of two purposes differ, however the parts are cut."""
    contexts = [
        make_context("a", "bc", "d"),
        make_context("a", "b", "cd"),
        make_context("ab", "c", "d"),
        make_context("a", "bcd"),
    ]
    assert len(set(contexts)) == 4
