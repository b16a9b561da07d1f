# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The strict reader of clients' answers: what a hostile client says is refused, in one short line."""

import json
import random
import time

import pytest
import torch

from fedlpp_hf import FederatedConfig
from fedlpp_hf.server.admission import Admission
from fedlpp_hf.wire.encoding import encode_message
from fedlpp_hf.wire.messages import ClientFailure, ClientTask, ClientUpdate, limit_update
from tests.flower.hostile import DESCRIPTIONS, ESCAPES, UPDATES, damage, make_update
from tests.helpers import FINGERPRINT


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

from fedlpp_hf.flower.answers import RefusalError, check_client_id, read_description, read_update


ADAPTER = {f"base_model.model.layer.{n}.lora_{f}.weight": torch.zeros(4, 16) for n in range(4) for f in "AB"}
TASK = ClientTask("federation", 2, 3, "evil", 0, FINGERPRINT, None)


def assert_one_short_line(text):
    assert text.isprintable() and len(text) <= 501


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_description_that_breaks_a_rule_is_refused(name):
    if name.startswith("received: 2**63"):
        assert (
            read_description(DESCRIPTIONS[name], 1) == 2**63 - 1
        )  # what that is beyond, the sender of the base knows
        return
    with pytest.raises(ValueError) as error:
        read_description(DESCRIPTIONS[name], 1)
    assert_one_short_line(str(error.value))
    assert isinstance(error.value, RefusalError) == name.startswith("error: ")


def test_description_that_keeps_the_rules_is_read():
    assert read_description({"clients": json.dumps({"klinik-ä": 6, "b": 10**9})}, 2) == {"klinik-ä": 6, "b": 10**9}
    assert read_description({"clients": json.dumps({"\U0001f98e" * 100: 1})}, 1) == {"\U0001f98e" * 100: 1}
    assert read_description({"received": 0}, 1) == 0
    assert read_description({"clients": '{"a": null}'}, 1, hides_rows=True) == {"a": None}
    with pytest.raises(
        ValueError, match="with secure_aggregation=False, and this server with secure_aggregation=True"
    ):
        read_description({"clients": '{"a": 1}'}, 1, hides_rows=True)
    with pytest.raises(RefusalError, match="it did not answer"):
        read_description("it did not answer", 1)


@pytest.mark.parametrize("client", ["", " a", "a ", "a\nb", "a\x1b", "\ud800", "\u202eb", "a" * 101])
def test_id_that_could_forge_a_line_is_none(client):
    with pytest.raises(ValueError, match="is no client id"):
        check_client_id(client)


@pytest.fixture
def admission(tmp_path):
    args = FederatedConfig(str(tmp_path), num_rounds=3, broadcast="never", use_cpu=True, report_to=[])
    return Admission(args, ADAPTER, {"evil": 6}, tmp_path / "updates")


@pytest.mark.parametrize("name", UPDATES)
def test_update_that_breaks_a_rule_is_refused(name, admission):
    """By the reader, or by admission: as the round does it."""
    content = UPDATES[name](TASK, ADAPTER)
    began = time.process_time()
    try:
        answer = read_update("evil", content, limit_update(ADAPTER))
    except ValueError as error:
        answer = ClientFailure("evil", str(error))
    accepted, rejected = admission.collect({"evil": TASK}, [answer])
    assert not accepted and list(rejected) == ["evil"]
    assert_one_short_line(rejected["evil"])
    assert time.process_time() - began < 2  # 200,000 empty tensors took 6 s


def test_update_that_keeps_the_rules_is_taken(admission):
    for delta in (ADAPTER, {key: value.double() for key, value in ADAPTER.items()}):
        data = make_update(
            TASK, ADAPTER, delta=delta, metrics={f'm{n:097}\\"': 1e300 for n in range(98)} | {"loss": 1.0, "steps": 1}
        )
        accepted, _ = admission.collect({"evil": TASK}, [read_update("evil", {"update": data}, limit_update(ADAPTER))])
        assert accepted["evil"].num_examples == 1


def test_no_damaged_update_is_taken(admission):
    source, data = random.Random(0), make_update(TASK, ADAPTER)
    for _ in range(300):
        damaged = damage(data, source)
        if damaged != data:
            with pytest.raises(ValueError) as error:
                read_update("evil", {"update": damaged}, limit_update(ADAPTER))
            assert len(str(error.value)) < 1000


def test_update_is_refused_by_its_size_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr("fedlpp_hf.wire.encoding.load", lambda data: pytest.fail("it was parsed"))
    limit = limit_update(ADAPTER)
    with pytest.raises(ValueError, match=f"expected at most {limit.num_bytes}"):
        read_update("evil", {"update": bytes(limit.num_bytes + 1)}, limit)
    data = make_update(TASK, {}, delta={str(n): torch.zeros(0) for n in range(2000)})
    assert len(data) < limit.num_bytes + 200_000
    with pytest.raises(ValueError, match="header of|bytes; expected at most"):
        read_update("evil", {"update": data}, limit)


def test_failure_is_told_in_one_line():
    assert ClientFailure("a", f"{ESCAPES}\n\nend").reason == "x Clients: a forged line [2J end"
    assert len(ClientFailure("a", "x" * 10**7).reason) == 501


def test_update_with_another_field_is_refused():
    header = {"federation_id": "f", "round": 1, "client_id": "c", "base_fingerprint": FINGERPRINT, "num_examples": 1}
    header |= {"metrics": {"loss": 1.0, "steps": 1}}
    ClientUpdate.from_bytes(encode_message("update", header, {}))
    with pytest.raises(ValueError, match="1 fields that no update has, such as 'extra'"):
        ClientUpdate.from_bytes(encode_message("update", header | {"extra": 1}, {}))
