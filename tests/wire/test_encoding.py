# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Bytes of messages: nothing that was damaged, made up or written by another version is accepted."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedlpp_hf.tensors.quantization import QuantizedTensor, quantize
from fedlpp_hf.wire.encoding import SCHEMA_VERSION, compute_digest, decode_message, encode_message
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate

from .samples import make_task, make_update, read_parts, same, write_parts


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


def test_message_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="Expected a task"):
        ClientTask.from_bytes(make_update().to_bytes())


@pytest.mark.parametrize("message", [make_task(), make_update()], ids=["task", "update"])
@pytest.mark.parametrize("schema", [1, 3, None])
def test_message_of_another_version_is_refused_in_one_line(message, schema):
    header, body, buffer = read_parts(message.to_bytes())
    with pytest.raises(ValueError, match=f"has schema {schema}; .* speaks 2. Install the same version") as error:
        type(message).from_bytes(write_parts(header, body | {"schema": schema}, buffer))
    assert "\n" not in str(error.value)


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


# From here on the checksum is right: what a client makes up itself, rather than what is damaged on the way.


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
    body = {"kind": "update", "schema": SCHEMA_VERSION, "quantized": quantized}
    body["sha256"] = compute_digest(body, tensors)
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
        ClientUpdate.from_bytes(write_parts({}, f'{{"kind": "update", "schema": {SCHEMA_VERSION}, "q": {deep}}}', b""))


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
