# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What left the owner for its clients, as a table: values, bits of information, bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


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
