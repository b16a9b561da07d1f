# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a merge did: norms of the updates by layer, tensors replaced and added, bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .jobs import ShardJobs
from .plan import MergePlan


@dataclass(slots=True)
class Norms:
    """Squared Frobenius norms: of the update ΔW, and of E = W − Q(W) where there is a base."""

    update: float = 0.0
    error: float | None = None

    def add_(self, other: "Norms") -> None:
        """Add the norms of other rows of the same parameter."""
        self.update += other.update
        if other.error is not None:
            self.error = (self.error or 0.0) + other.error


@dataclass(frozen=True, slots=True)
class LayerReport:
    """A parameter that the adapter updates: the Frobenius norm of ΔW, and of E = W − Q(W) where a base was given."""

    parameter: str
    update_norm: float
    error_norm: float | None = None

    @property
    def ratio(self) -> float | None:
        """‖E‖/‖ΔW‖: well below 1, W + ΔW and Q(W) + ΔW are much the same model; above, they are not."""
        if self.error_norm is None or not self.update_norm:
            return None
        return self.error_norm / self.update_norm


@dataclass(slots=True)
class MergeReport:
    """What a merge did.

    `base_weight`: λ of W − λE; `layers`: in the model's order; `replaced` and `added`: names of tensors; bytes are of the result; `through_peft`: why
    PEFT merged, if it did.
    """

    output_dir: str
    base_weight: float
    layers: list[LayerReport] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    bytes_copied: int = 0
    bytes_rewritten: int = 0
    seconds: float = 0.0
    verified: bool = False
    through_peft: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with each layer's ratio."""
        layers = [asdict(layer) | {"ratio": layer.ratio} for layer in self.layers]
        return asdict(self) | {"layers": layers}

    def record_(self, plan: MergePlan, norms: Mapping[str, Norms], shards: Iterable[ShardJobs]) -> None:
        """Fill in what was done, from the plan, the norms by parameter and the jobs."""
        products = {name for name, edit in plan.edits.items() if edit.key_a}
        products |= {name for name, _, edit in plan.added if edit.key_a}
        self.layers = [
            LayerReport(name, found.update**0.5, None if found.error is None else found.error**0.5)
            for name in plan.shapes
            if name in products and (found := norms.get(name)) is not None
        ]
        self.replaced = sorted(name for name, edit in plan.edits.items() if edit.value is not None)
        self.added = [name for name, _, _ in plan.added]
        for jobs in shards:
            self.bytes_copied += sum(copy.length for copy in jobs.copies)
            self.bytes_rewritten += sum(rewrite.length for rewrite in jobs.rewrites)
