# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Compressed updates: what arrives, what it costs on the wire, and that feedback lets nothing be lost for good."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlpp_hf.tensors.quantization import QuantizedTensor
from fedlpp_hf.wire import compression
from fedlpp_hf.wire.compression import compress_update, decode_gaps, decompress_update, encode_gaps
from fedlpp_hf.wire.messages import ClientUpdate


def random_update(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "q.lora_A.weight": torch.randn(8, 96, generator=generator),
        "q.lora_B.weight": torch.randn(64, 8, generator=generator) * 1e-3,
        "bias": torch.randn(1, generator=generator),
    }


def message(payload) -> ClientUpdate:
    return ClientUpdate("f", 1, "c", "base", 1, payload)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 5000)))
def test_gaps_round_trip(places):
    places = torch.tensor(sorted(places), dtype=torch.long)
    assert torch.equal(decode_gaps(encode_gaps(places)), places)


@pytest.mark.parametrize("place", [0, 254, 255, 256, 509, 510, 511])
def test_gaps_at_the_escape(place):
    places = torch.tensor([place])
    assert torch.equal(decode_gaps(encode_gaps(places)), places)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 32])
@pytest.mark.parametrize("density", [1.0, 0.1, 1e-6])
def test_what_is_sent_and_the_error_are_the_update(bits, density):
    update, memory = random_update(), {"q.lora_A.weight": torch.randn(8, 96)}
    payload, error = compress_update(update, bits, 64, density, memory)
    arrived = decompress_update(ClientUpdate.from_bytes(message(payload).to_bytes()).delta, update)
    for key, tensor in update.items():
        torch.testing.assert_close(arrived[key] + error[key], tensor + memory.get(key, 0))
        if density < 1:
            assert int((arrived[key] != 0).sum()) <= max(1, round(density * tensor.numel() + 0.5))
    if bits == 32 and density == 1:
        assert all(not error[key].any() for key in error)


def test_top_k_keeps_the_largest():
    update = random_update()
    payload, _ = compress_update(update, density=0.1)
    arrived = decompress_update(payload, update)
    for key, tensor in update.items():
        kept = arrived[key] != 0
        assert torch.equal(arrived[key][kept], tensor[kept])
        assert tensor[~kept].abs().max() <= tensor[kept].abs().min() if (~kept).any() else True


def test_with_feedback_the_sum_arrives_and_without_it_does_not():
    update, sent, lost, memory = random_update(), {}, {}, {}
    rounds = 60
    for _ in range(rounds):
        payload, memory = compress_update(update, 2, 64, 0.05, memory)
        for totals, part in ((sent, payload), (lost, compress_update(update, 2, 64, 0.05)[0])):
            for key, tensor in decompress_update(part, update).items():
                totals[key] = totals.get(key, 0) + tensor
    for key in ("q.lora_A.weight", "q.lora_B.weight"):
        error = [float((totals[key] / rounds - update[key]).norm() / update[key].norm()) for totals in (sent, lost)]
        assert error[0] < 0.15 < 0.5 < error[1]


def test_what_a_round_does_not_send_keeps_its_error():
    update = random_update()
    memory = {"q.lora_B.weight": torch.ones(64, 8)}
    _, error = compress_update({"bias": update["bias"]}, 2, 64, 1.0, memory)
    assert torch.equal(error["q.lora_B.weight"], memory["q.lora_B.weight"])


def test_real_messages_shrink():
    update = {"w": torch.randn(512, 512, generator=torch.Generator().manual_seed(0))}
    whole = len(message(update).to_bytes())
    # 4 bits and a scale per 256; one value in 100 with a byte for its place; the same with 4 bits per value.
    for options, bits_per_value in (
        ({"bits": 4}, 4.13),
        ({"density": 0.01}, 0.41),
        ({"bits": 4, "density": 0.01}, 0.13),
    ):
        size = len(message(compress_update(update, **options)[0]).to_bytes())
        assert size == pytest.approx(whole * bits_per_value / 32, abs=700)


@pytest.mark.parametrize("density", [0.0, 1.1, -0.5, float("nan")])
def test_bad_densities_are_refused(density):
    with pytest.raises(ValueError, match="density"):
        compress_update(random_update(), density=density)


def test_damaged_sparse_updates_are_refused():
    update = {"w": torch.randn(10, 10)}
    good, _ = compress_update(update, density=0.1)
    gaps = good["w@gaps"]
    for damage, reason in (
        ({"w@gaps": torch.cat([gaps, gaps])}, "values for"),
        ({"w@gaps": torch.full((100,), 255, dtype=torch.uint8)}, "values for"),
        ({"w@gaps": torch.full((200,), 255, dtype=torch.uint8)}, "200 bytes of positions; expected at most 100"),
        ({"w@gaps": torch.cat([torch.full((1,), 254, dtype=torch.uint8), gaps[1:]])}, "below 100"),
        ({"w@gaps": gaps.float()}, "malformed"),
        ({"w@values": good["w@values"] * float("nan")}, "NaN"),
        ({"w": update["w"]}, "twice"),
        ({"v@values": torch.ones(1), "v@gaps": gaps[:1]}, "unknown: v"),
    ):
        with pytest.raises(ValueError, match=reason):
            decompress_update(good | damage, update)
    with pytest.raises(ValueError, match="malformed"):
        decompress_update({"w@values": good["w@values"]}, update)
    with pytest.raises(ValueError, match="not its values"):
        decompress_update({"w@gaps": gaps}, update)
    with pytest.raises(ValueError, match="missing: w"):
        decompress_update({}, update)


def test_forged_positions_are_not_decoded(monkeypatch):
    """An update may be as large as the adapter in float64, and all of it positions: decoding takes twenty times that."""
    monkeypatch.setattr(compression, "decode_gaps", lambda encoded: pytest.fail("decoded"))
    payload = {"w@gaps": torch.zeros(101, dtype=torch.uint8), "w@values": torch.zeros(1)}
    with pytest.raises(ValueError, match="101 bytes of positions"):
        decompress_update(payload, {"w": torch.zeros(10, 10)})


def test_all_values_kept_take_a_byte_each():
    update = {"w": torch.randn(10, 10)}
    sent, _ = compress_update(update, density=1 - 1e-9)
    assert sent["w@gaps"].numel() == 100 and torch.equal(decompress_update(sent, update)["w"], update["w"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_made_up_payload_is_an_update_or_a_value_error(data):
    update = random_update()
    payload, _ = compress_update(
        update, data.draw(st.sampled_from([2, 3, 32])), 64, data.draw(st.sampled_from([1.0, 0.1]))
    )
    name = data.draw(st.sampled_from(sorted(payload)))
    value = payload.pop(name)
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        name = data.draw(
            st.sampled_from([name, "bias", "x@gaps", "@values", "q.lora_A.weight@gaps", "q.lora_A.weight"])
        )
    if isinstance(value, QuantizedTensor):
        count = data.draw(st.integers(0, 200))
        codes = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=seed)
        shape = data.draw(st.sampled_from([value.shape, (count,), (2**40,), ()]))
        payload[name] = QuantizedTensor(codes, value.scales, shape, value.bits, value.block_size)
    elif value.dtype == torch.uint8:
        payload[name] = torch.randint(0, 256, (data.draw(st.integers(0, 2000)),), dtype=torch.uint8, generator=seed)
    else:
        payload[name] = data.draw(st.sampled_from([value[:0], value.reshape(-1)[:5], value / 0, value.half()]))
    try:
        arrived = decompress_update(payload, update)
    except ValueError:
        return
    assert {key: tensor.shape for key, tensor in arrived.items()} == {key: t.shape for key, t in update.items()}
    assert all(torch.isfinite(tensor).all() for tensor in arrived.values())


@pytest.mark.parametrize("names", [("bias",), ("bias@values", "bias@gaps")])
def test_a_value_beyond_float32_is_refused(names):
    reference = {"bias": torch.zeros(1)}
    payload = dict(
        zip(names, (torch.tensor([1e300], dtype=torch.float64), torch.tensor([0], dtype=torch.uint8)), strict=False)
    )
    with pytest.raises(ValueError, match="infinite"):
        decompress_update(payload, reference)
