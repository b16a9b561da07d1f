# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What left the owner for its clients, tensor by tensor: values, bits of information, bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..base.manifest import read_manifest
from ..tensors.adapters import PREFIX
from ..tensors.quantization import QuantizedTensor


@dataclass(frozen=True, slots=True)
class SentTensor:
    """A tensor that clients hold: of the `base`, or of a `proxy`, of which they were sent one for each broadcast.

    `kind` is the manifest's for the base, `quantized` or `full_precision` for a proxy. `values` are its elements, `bytes` what
    carries their information.
    """

    part: str
    name: str
    kind: str
    values: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits of information per value, scales included."""
        return 8 * self.bytes / max(self.values, 1)


def list_sent(trainer: Any) -> list[SentTensor]:
    """The tensors of the base and of a proxy of the federation that `trainer` has run."""
    base_dir = trainer.blueprint.base_dir
    if base_dir:
        entries = read_manifest(base_dir)["tensors"]
        sent = [
            SentTensor("base", e["name"], e["kind"], math.prod(e["shape"]), int(e["information_bytes"]))
            for e in entries
        ]
    else:
        sent = [
            SentTensor("base", name.removeprefix(PREFIX), "full_precision", p.numel(), p.nbytes)
            for name, p in trainer.guard.frozen
        ]
    if not trainer.args.broadcasts:
        return sent
    for name, tensor in trainer.server.make_proxy(trainer.server.adapter).items():
        kind = "quantized" if isinstance(tensor, QuantizedTensor) else "full_precision"
        sent.append(SentTensor("proxy", name, kind, math.prod(tensor.shape), tensor.nbytes))
    return sent


def summarize_sent(sent: Sequence[SentTensor]) -> list[list[str]]:
    """Rows of a table: part, kind, tensors, values, bits per value, MB."""

    def key(entry: SentTensor) -> tuple[str, str]:
        return entry.part, entry.kind

    rows = [["what clients hold", "kind", "tensors", "values", "bits per value", "MB"]]
    for (part, kind), group in groupby(sorted(sent, key=key), key):
        entries = list(group)
        values, size = sum(e.values for e in entries), sum(e.bytes for e in entries)
        bits = 8 * size / max(values, 1)
        rows.append([part, kind, str(len(entries)), f"{values:,}", f"{bits:.2f}", f"{size / 1e6:.3f}"])
    return rows
