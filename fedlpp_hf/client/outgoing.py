# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What leaves a client: the update as it is packed, and as its client can read it."""

import math
from collections.abc import Mapping

import torch

from ..privacy.clipping import clip_update
from ..tensors.adapters import global_norm
from ..tensors.codebooks import FULL_PRECISION
from ..tensors.quantization import QuantizedTensor
from ..wire.compression import GAPS, VALUES, compress_update, decompress_update
from ..wire.encoding import Payload
from ..wire.messages import ClientUpdate, LocalOptions


Tensors = Mapping[str, torch.Tensor]

_EXAMPLES = 3  # values of each tensor


def pack_update(
    delta: Tensors, options: LocalOptions, left: Tensors, own_clip: float | None = None
) -> tuple[Payload, dict[str, torch.Tensor]]:
    """The update as it is sent, and what compression left of it.

    Without a clip of the client's own, the task's bounds the change, before what earlier updates left is added to it. With one,
    the smaller of the two bounds everything that is sent, rounding included.

    Args:
        delta: The client's change.
        options: Of the task.
        left: What compression left of earlier updates.
        own_clip: Of the client's policy.
    """
    compression = (options.update_bits, options.update_block_size, options.update_density)
    compresses = options.update_bits != FULL_PRECISION or options.update_density < 1
    if own_clip is None:
        if options.clip_norm:
            delta, _ = clip_update(delta, options.clip_norm)
        return compress_update(delta, *compression, left) if compresses else (delta, {})
    limit = min(own_clip, options.clip_norm or math.inf)
    wanted, _ = clip_update({key: tensor + left.get(key, 0.0) for key, tensor in delta.items()}, limit)
    if not compresses:
        return wanted, {}
    payload, error = compress_update(wanted, *compression)
    sent = global_norm(decompress_update(payload, wanted))
    if sent > limit:  # codes round away from zero, too
        payload, error = compress_update({key: value * (limit / sent) for key, value in wanted.items()}, *compression)
    return payload, error


def describe_update(update: ClientUpdate, reference: Tensors) -> str:
    """Markdown of all that an update says: its fields, metrics and tensors, with the first values of each.

    Args:
        update: As it would be sent.
        reference: Tensors of these keys and shapes; there may be more.
    """
    sent = {key.removesuffix(GAPS).removesuffix(VALUES) for key in update.delta}
    tensors = decompress_update(update.delta, {key: value for key, value in reference.items() if key in sent})
    lines = [
        f"{update.num_bytes:,} bytes would leave this machine; the change's norm is {global_norm(tensors):.6g}.",
        "",
        "| field | value |",
        "|---|---|",
    ]
    for name in ("federation_id", "round", "client_id", "base_fingerprint", "num_examples"):
        lines.append(f"| {name} | {getattr(update, name)} |")
    lines += [f"| metric {name} | {value:g} |" for name, value in sorted(update.metrics.items())]
    lines += ["", "| tensor | shape | sent as | norm | first values |", "|---|---|---|---|---|"]
    for key, tensor in sorted(tensors.items()):
        stored = update.delta[key if key in update.delta else key + VALUES]
        bits = f"{stored.bits} bits" if isinstance(stored, QuantizedTensor) else str(stored.dtype)
        form = bits.removeprefix("torch.")
        form += "" if key in update.delta else f", {stored.shape[0]:,} places"
        values = ", ".join(f"{value:.4g}" for value in tensor.flatten()[:_EXAMPLES].tolist())
        shape = " × ".join(map(str, tensor.shape))
        lines.append(f"| {key} | {shape} | {form} | {float(tensor.norm()):.4g} | {values} |")
    return "\n".join(lines)
