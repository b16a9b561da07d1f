# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What crosses the wire comes back equal, and nothing that was damaged or made up is accepted."""

import json
import math
import struct
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fedlpp_hf.tensors.quantization import BITS, QuantizedTensor, quantize
from fedlpp_hf.wire.messages import (
    ClientTask,
    ClientUpdate,
    LocalOptions,
    decode_message,
    encode_message,
    restore_tensors,
)


KEY = "base_model.model.layers.0.q_proj.lora_A.weight"


def make_task(bits: int = 2) -> ClientTask:
    generator = torch.Generator().manual_seed(0)
    proxy = {KEY: quantize(torch.randn(3, 7, generator=generator), bits, 8), "b": torch.randn(2, generator=generator)}
    options = LocalOptions(rule="exact", rank=2, clip_norm=1, update_density=0.1, error_feedback=True)
    control = {KEY: quantize(torch.ones(3, 7), bits, 8)}
    return ClientTask("f0", 3, 10, "klinik-ä", 1234, "ab" * 32, proxy, options, control)


def make_update(**changes) -> ClientUpdate:
    delta = {KEY: torch.arange(6.0).view(2, 3), "b": quantize(torch.tensor([1.0, -2.0]), 8)}
    return replace(ClientUpdate("f0", 3, "a", "ab" * 32, 5, delta, {"loss": 0.5, "steps": 7}), **changes)


def same(one, other) -> bool:
    """Equality of messages to the bit: dataclasses of tensors have none of their own."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if hasattr(one, "__slots__"):
        return type(one) is type(other) and all(
            same(getattr(one, name), getattr(other, name)) for name in one.__slots__
        )
    return one == other or (one != one and other != other)


def read_parts(data: bytes) -> tuple[dict, dict, bytes]:
    """Header, the message's own JSON and the buffer of a message."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["fedlpp_hf"]), data[8 + size :]


def write_parts(header: dict | str, body: dict | str | None, buffer: bytes) -> bytes:
    if body is not None:
        text = body if isinstance(body, str) else json.dumps(body, sort_keys=True)
        header = {**header, "__metadata__": {"fedlpp_hf": text}}
    encoded = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(encoded)) + encoded + buffer


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


def test_truncated_message_is_refused_at_every_length():
    data = make_update().to_bytes()
    for length in range(len(data)):
        with pytest.raises(ValueError):
            ClientUpdate.from_bytes(data[:length])


def test_bytes_behind_a_message_are_refused():
    with pytest.raises(ValueError):
        ClientUpdate.from_bytes(make_update().to_bytes() + b"\0")


@pytest.mark.parametrize("claim", [2**40, 2**63, 2**64 - 1])
def test_header_that_claims_terabytes_is_refused_unread(claim):
    data = make_update().to_bytes()
    with pytest.raises(ValueError, match="claims more than there is"):
        ClientUpdate.from_bytes(struct.pack("<Q", claim) + data[8:])


def test_every_changed_payload_byte_is_refused():
    data = make_update().to_bytes()
    for place in range(8 + struct.unpack("<Q", data[:8])[0], len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(ValueError, match="checksum"):
            ClientUpdate.from_bytes(bytes(damaged))


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_examples", 5000),
        ("round", 4),
        ("client_id", "b"),
        ("metrics", {"loss": 0.1}),
        ("quantized", {}),
        ("x", 1),
    ],
)
def test_changed_header_value_is_refused(name, value):
    header, body, buffer = read_parts(make_update().to_bytes())
    with pytest.raises(ValueError, match="checksum"):
        ClientUpdate.from_bytes(write_parts(header, body | {name: value}, buffer))


def test_tensors_that_changed_places_are_refused():
    data = encode_message("update", {}, {"a": torch.zeros(2), "b": torch.ones(2)})
    header, body, buffer = read_parts(data)
    header["a"], header["b"] = header["b"], header["a"]
    with pytest.raises(ValueError, match="checksum"):
        decode_message("update", write_parts(header, body, buffer))


@pytest.mark.parametrize("entry", [{"dtype": "BF16"}, {"shape": [3, 2]}])
def test_tensor_that_would_be_read_otherwise_is_refused(entry):
    header, body, buffer = read_parts(encode_message("update", {}, {"a": torch.ones(2, 3).half()}))
    header["a"] |= entry
    with pytest.raises(ValueError, match="checksum"):
        decode_message("update", write_parts(header, body, buffer))


def test_message_of_another_kind_or_schema_is_refused():
    with pytest.raises(ValueError, match="Expected a task"):
        ClientTask.from_bytes(make_update().to_bytes())
    header, body, buffer = read_parts(make_update().to_bytes())
    with pytest.raises(ValueError, match="schema 2.*Install the same version"):
        ClientUpdate.from_bytes(write_parts(header, body | {"schema": 2}, buffer))


def test_file_of_others_is_refused():
    for data in (b"", b"PK\x03\x04" + b"\0" * 60, save({"a": torch.ones(2)}), save({"a": torch.ones(2)}, {"x": "y"})):
        with pytest.raises(ValueError):
            ClientUpdate.from_bytes(data)
    for body in ("[]", "null", "{", "1" * 5000, "[" * 5000, '"text"'):
        with pytest.raises(ValueError):
            ClientUpdate.from_bytes(write_parts({}, body, b""))


def test_key_that_comes_twice_is_refused():
    header, body, buffer = read_parts(make_update().to_bytes())
    text = json.dumps(body)
    with pytest.raises(ValueError, match="twice"):
        ClientUpdate.from_bytes(write_parts(header, text.replace("{", '{"round": 1, ', 1), buffer))
    entry = '"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    with pytest.raises(ValueError, match="twice"):
        ClientUpdate.from_bytes(
            write_parts(f'{{"__metadata__": {{"fedlpp_hf": "{{}}"}}, {entry}, {entry}}}', None, b"x")
        )


# From here on the checksum is right: what a client makes up itself, rather than what is damaged on the way.


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
    "changes", [{"rule": 1}, {"rank": -1}, {"rank": 2.0}, {"clip_norm": "1"}, {"clip_norm": None}, {"scaffold": 1}]
)
def test_option_of_a_wrong_type_is_refused_by_its_name(changes):
    with pytest.raises(ValueError, match=f"task's options's `{next(iter(changes))}`"):
        ClientTask.from_bytes(replace(make_task(), options=LocalOptions(**changes)).to_bytes())


def test_options_of_another_version_are_refused():
    header = {name: getattr(TASK, name) for name in ClientTask.__slots__[:6]}
    for options in (None, {}, {**asdict(TASK.options), "new": 1}):
        with pytest.raises(ValueError, match="`options`"):
            ClientTask.from_bytes(encode_message("task", header | {"options": options}, {}))


def test_missing_field_is_refused():
    with pytest.raises(ValueError, match="task's `federation_id` is None"):
        ClientTask.from_bytes(encode_message("task", {}, {}))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (-2, -3)},
        {"shape": (2, 4)},
        {"shape": (10**12, 10**12)},
        {"shape": (0, 2**62, 2**62)},
        {"shape": (1,) * 64 + (6,)},
        {"shape": (6.0,)},
        {"shape": (True, 6)},
        {"shape": "6"},
        {"bits": 5},
        {"bits": "4"},
        {"bits": 8},
        {"block_size": 0},
        {"block_size": 2},
        {"block_size": 4.0},
        {"codes": torch.zeros(3, dtype=torch.int32)},
        {"codes": torch.zeros(1, 3, dtype=torch.uint8)},
        {"scales": torch.ones(2, dtype=torch.int64)},
        {"scales": torch.ones(2, dtype=torch.float8_e4m3fn)},
        {"scales": torch.ones(2, 1)},
        {"scales": torch.ones(3)},
    ],
)
def test_malformed_quantized_tensor_is_refused(changes):
    whole = {"codes": torch.zeros(3, dtype=torch.uint8), "scales": torch.ones(2), "shape": (2, 3), "bits": 4}
    whole = {**whole, "block_size": 4}
    update = make_update(delta={"q": QuantizedTensor(**whole)})
    assert same(ClientUpdate.from_bytes(update.to_bytes()), update)
    with pytest.raises(ValueError, match="can't be read"):
        ClientUpdate.from_bytes(make_update(delta={"q": QuantizedTensor(**whole | changes)}).to_bytes())


def test_quantized_tensor_without_codes_is_refused():
    with pytest.raises(ValueError, match="can't be read"):
        decode_message("update", encode_with_tensors({"q": [[2], 4, 4]}, {}))


def test_tensor_that_would_hide_another_is_refused_on_both_sides():
    quantized = quantize(torch.ones(2), 4)
    with pytest.raises(ValueError, match="stored as `q#codes`"):
        encode_message("update", {}, {"q": quantized, "q#codes": torch.ones(2)})
    forged = encode_with_tensors(
        {"q": [[2], 4, 256]}, {"q#codes": quantized.codes, "q#scales": quantized.scales, "q": torch.ones(2)}
    )
    with pytest.raises(ValueError, match="`q` twice"):
        decode_message("update", forged)


def encode_with_tensors(quantized: dict, tensors: dict[str, torch.Tensor]) -> bytes:
    """A message whose checksum is right, but that [`encode_message`] would not write."""
    from fedlpp_hf.wire.messages import _digest

    body = {"kind": "update", "schema": 1, "quantized": quantized}
    body["sha256"] = _digest(body, tensors)
    return save(tensors, {"fedlpp_hf": json.dumps(body, sort_keys=True)})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_plain_tensor_of_another_dtype_is_refused_on_both_sides(dtype):
    tensor = torch.zeros(2).to(dtype)
    with pytest.raises(ValueError, match="`w` is of"):
        encode_message("update", {}, {"w": tensor})
    with pytest.raises(ValueError, match="`w` is of"):
        decode_message("update", encode_with_tensors({}, {"w": tensor}))


def test_empty_tensor_of_absurd_sizes_is_refused():
    header, body, _ = read_parts(make_update(delta={}).to_bytes())
    for shape in ([0, 2**62, 2**62], [0, 2**63]):
        header["w"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        with pytest.raises(ValueError, match="no message"):
            ClientUpdate.from_bytes(write_parts(header, body, b""))


def test_deep_nesting_is_refused():
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(ValueError, match="RecursionError"):
        ClientUpdate.from_bytes(write_parts({}, f'{{"kind": "update", "schema": 1, "q": {deep}}}', b""))


TASK, UPDATE = make_task(), make_update()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_byte_is_refused_or_changes_nothing(data):
    message = data.draw(st.sampled_from([TASK, UPDATE]))
    encoded = bytearray(message.to_bytes())
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] = data.draw(st.integers(0, 255))
    try:
        received = type(message).from_bytes(bytes(encoded))
    except ValueError:
        return
    assert same(received, message)


names = st.text(max_size=8)
tensors = st.lists(st.floats(width=32, allow_nan=False), max_size=9).map(torch.tensor)
payloads = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
    tensors
    | st.tuples(tensors, st.sampled_from(BITS)).filter(lambda v: v[0].isfinite().all()).map(lambda v: quantize(*v)),
    max_size=4,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    client=names,
    number=st.integers(0, 2**63 - 1),
    payload=payloads,
    metrics=st.dictionaries(names, st.floats() | st.integers(-(2**63) + 1, 2**63 - 1), max_size=3),
)
def test_any_update_comes_back_equal(client, number, payload, metrics):
    update = make_update(client_id=client, num_examples=number, delta=payload, metrics=metrics)
    assert same(ClientUpdate.from_bytes(update.to_bytes()), update)
