# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What crosses the wire comes back equal, is counted without being sent, and has fields of the right types."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from fedlpp_hf.tensors.codebooks import BITS
from fedlpp_hf.tensors.quantization import quantize
from fedlpp_hf.wire.encoding import encode_message, measure_message, restore_tensors
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate, LocalOptions

from .samples import KEY, make_task, make_update, names, payloads, same


@pytest.mark.parametrize("bits", BITS)
def test_task_comes_back_equal(bits):
    task = make_task(bits)
    received = ClientTask.from_bytes(task.to_bytes())
    assert same(received, task)
    assert same(received.proxy_tensors(), task.proxy_tensors())


def test_task_without_broadcast_is_not_a_task_with_an_empty_proxy():
    for proxy in (None, {}):
        assert ClientTask.from_bytes(replace(make_task(), proxy=proxy).to_bytes()).proxy == proxy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 3), (2, 1, 3)])
def test_update_comes_back_equal(dtype, shape):
    update = make_update(delta={"w": torch.ones(shape, dtype=dtype), "q": quantize(torch.ones(shape), 3, 4)})
    received = ClientUpdate.from_bytes(update.to_bytes())
    assert same(received, update)
    assert same(restore_tensors(received.delta), {"w": torch.ones(shape), "q": torch.ones(shape)})


def test_update_without_tensors_comes_back_equal():
    assert same(
        ClientUpdate.from_bytes(make_update(delta={}, metrics={}).to_bytes()), make_update(delta={}, metrics={})
    )


def test_half_precision_scales_come_back_equal():
    update = make_update(delta={"q": quantize(torch.randn(9), 2, 4, torch.float16)})
    assert same(ClientUpdate.from_bytes(update.to_bytes()), update)


def test_tensor_that_is_a_view_is_sent_as_its_values():
    square = torch.arange(9.0).view(3, 3)
    received = ClientUpdate.from_bytes(make_update(delta={"t": square.T, "row": square[1]}).to_bytes())
    assert same(restore_tensors(received.delta), {"t": square.T.contiguous(), "row": square[1]})


def test_equal_messages_make_equal_bytes():
    update = make_update()
    turned = replace(update, delta=dict(reversed(update.delta.items())), metrics={"steps": 7, "loss": 0.5})
    assert turned.to_bytes() == update.to_bytes()
    assert ClientUpdate.from_bytes(update.to_bytes()).to_bytes() == update.to_bytes()
    assert make_update(num_examples=6).to_bytes() != update.to_bytes()


def test_message_is_a_safetensors_file_of_packed_codes():
    tensors = load(make_task(bits=2).to_bytes())
    assert tensors[f"{KEY}#codes"].numel() == math.ceil(21 / 4)
    assert tensors[f"{KEY}#scales"].numel() == math.ceil(21 / 8)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_metric_that_is_no_number_is_told_as_it_is(loss):
    assert same(ClientUpdate.from_bytes(make_update(metrics={"loss": loss}).to_bytes()).metrics, {"loss": loss})


metric_names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=100)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    client=names,
    number=st.integers(0, 2**63 - 1),
    payload=payloads,
    metrics=st.dictionaries(metric_names, st.floats() | st.integers(-(2**63) + 1, 2**63 - 1), max_size=3),
)
def test_any_update_comes_back_equal(client, number, payload, metrics):
    update = make_update(client_id=client, num_examples=number, delta=payload, metrics=metrics)
    assert same(ClientUpdate.from_bytes(update.to_bytes()), update)


# The bytes that a simulation counts, though it sends none.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
# Of any dtype, with sizes that take from one to five digits, under names that JSON must escape and that sort differently
# as text and as bytes.
any_tensors = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.sampled_from([(), (0,), (1,), (3, 0, 2), (9,), (2, 5), (7, 1, 19), (1, 2**10)]),
    st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
any_quantized = st.builds(
    lambda count, bits, block, dtype: quantize(torch.ones(count), bits, block, dtype),
    st.integers(0, 3000),
    st.sampled_from(BITS),
    st.sampled_from([1, 7, 256]),
    st.sampled_from([torch.float16, torch.float32]),
)
odd_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6) | st.sampled_from(
    ['"', "\\", "\n\t\x00\x1f\x7f", "\u2028", "ä", "￿", "🦙", "#codes", "layers.10", "layers.9", KEY]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    kind=names,
    header=st.dictionaries(st.text(max_size=6), json_values, max_size=4),
    payload=st.dictionaries(odd_names, any_tensors | any_quantized, max_size=6),
)
def test_measure_is_the_length_of_the_bytes(kind, header, payload):
    assert measure_message(kind, header, payload) == len(encode_message(kind, header, payload))


def test_measure_of_many_tensors_is_the_length_of_the_bytes():
    """Offsets that grow by a digit within one header, whose place depends on the order in the file."""
    payload = {f"layers.{number}": torch.ones(number, dtype=torch.float16) for number in range(300)}
    payload |= {f"layers.{number}.q": quantize(torch.ones(50 * number), 3, 64) for number in range(40)}
    assert measure_message("update", {}, payload) == len(encode_message("update", {}, payload))


@pytest.mark.parametrize("bits", BITS)
def test_messages_know_their_size(bits):
    for message in (make_task(bits), replace(make_task(bits), proxy=None), make_update(), make_update(delta={})):
        assert message.num_bytes == len(message.to_bytes())


def test_measure_refuses_what_can_not_be_sent():
    for payload in (
        {"w": torch.zeros(2, dtype=torch.int64)},
        {"q": quantize(torch.ones(2), 4), "q#codes": torch.ones(2)},
    ):
        for function in (measure_message, encode_message):
            with pytest.raises(ValueError, match="`w` is of|stored as `q#codes`"):
                function("update", {}, payload)


# Fields: the checksum is right, and the client made up the rest.


@pytest.mark.parametrize(
    "changes",
    [
        {"round": "3"},
        {"round": -1},
        {"round": 3.0},
        {"round": True},
        {"num_examples": None},
        {"num_examples": 10**400},
        {"client_id": 3},
        {"client_id": "\ud800"},
        {"base_fingerprint": ["ab"]},
        {"metrics": None},
        {"metrics": [1.0]},
        {"metrics": {"loss": "0.5"}},
        {"metrics": {"loss": True}},
        {"metrics": {"loss": 10**400}},
    ],
)
def test_field_of_a_wrong_type_is_refused_by_its_name(changes):
    with pytest.raises(ValueError, match=f"update's `{next(iter(changes))}`"):
        ClientUpdate.from_bytes(make_update(**changes).to_bytes())


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": 1},
        {"update_bits": -1},
        {"update_bits": 2.0},
        {"update_block_size": True},
        {"clip_norm": "1"},
        {"clip_norm": None},
    ],
)
def test_option_of_a_wrong_type_is_refused_by_its_name(changes):
    with pytest.raises(ValueError, match=f"task's options's `{next(iter(changes))}`"):
        ClientTask.from_bytes(replace(make_task(), options=LocalOptions(**changes)).to_bytes())


def test_options_of_another_version_are_refused():
    task = make_task()
    header = {name: getattr(task, name) for name in ClientTask.__slots__[:6]}
    for options in (None, {}, {**asdict(task.options), "new": 1}):
        with pytest.raises(ValueError, match="`options`"):
            ClientTask.from_bytes(encode_message("task", header | {"options": options}, {}))


def test_missing_field_is_refused():
    with pytest.raises(ValueError, match="task's `federation_id` is None"):
        ClientTask.from_bytes(encode_message("task", {}, {}))
