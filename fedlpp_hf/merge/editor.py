# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The merge's arithmetic: new rows from old ones, chunk by chunk."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .plan import Edit, MergePlan
from .shards import TensorRange, copy_range, find_difference, read_range, write_range
from .sources import AdapterReader, BaseReader


# Small enough that a chunk, its update and its result stay in a core's cache; large enough for the call overhead.
CHUNK_BYTES = 1 << 20
BLOCK_BYTES = 32 << 20
# Products of fewer rows go through other kernels, which add in another order: keep chunks multiples of this.
ROW_MULTIPLE = 64


@dataclass(slots=True)
class Norms:
    """Squared Frobenius norms of one parameter: of the update ΔW, and of E = W − Q(W) where there is a base."""

    update: float = 0.0
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that are the same in source and destination."""

    start: int
    length: int
    to: int


@dataclass(frozen=True, slots=True)
class Rewrite:
    """`rows` rows of `row_bytes` bytes that `edit` changes, from `start` in the source to `to` in the destination.

    They are rows `first` and on of one expert of `parameter`. `start` is None where nothing is read.
    """

    tensor: TensorRange
    parameter: str
    edit: Edit
    expert: int | None
    first: int
    rows: int
    row_bytes: int
    start: int | None
    to: int


@dataclass(slots=True)
class Editor:
    """Computes new rows from old ones; safe to share between threads."""

    plan: MergePlan
    adapters: Sequence[AdapterReader]
    weights: Sequence[float]
    base: BaseReader | None = None
    into_base: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    norms: dict[str, Norms] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def takes_base(self, parameter: str) -> bool:
        return self.into_base and self.base is not None and self.base.is_quantized(parameter)

    def edit_of(self, parameter: str) -> Edit | None:
        return self.plan.edits.get(parameter, Edit() if self.takes_base(parameter) else None)

    def run(self, job: Copy | Rewrite, source: int, destination: int, verify: bool = False) -> None:
        """Do a job, or with `verify` check that it was done.

        Raises:
            RuntimeError: if what is checked differs.
            ValueError: if a result is not finite.
        """
        if isinstance(job, Rewrite):
            self._rewrite(job, source, destination, verify)
        elif not verify:
            copy_range(source, destination, job.start, job.length, job.to)
        else:
            at = find_difference(source, destination, job.start, job.length, job.to)
            if at is not None:
                raise RuntimeError(f"Byte {job.to + at} of the result is not the source's; the merge is damaged.")

    @torch.inference_mode()
    def _rewrite(self, job: Rewrite, source: int, destination: int, verify: bool) -> None:
        edit, dtype = job.edit, job.tensor.torch_dtype
        norms, columns = Norms(), job.row_bytes // dtype.itemsize
        if edit.value is not None:
            mean = self._mean([reader.read(edit.value) for reader in self.adapters])
            self._store(_select(mean, job, columns), job, 0, destination, verify)
            return
        work = torch.float64 if len(self.adapters) > 1 or dtype == torch.float64 else torch.float32
        original = None
        if self.base is not None and self.base.is_quantized(job.parameter):
            original = _select(self.base.read(job.parameter), job, columns)
        factors = [
            tuple(f.to(self.device, work) for f in edit.load_factors(reader, job.expert)) if edit.key_a else None
            for reader in self.adapters
        ]
        step = job.rows if edit.magnitude and edit.transposed else self._step(job.row_bytes)
        bounds = list(range(0, job.rows, step))
        if len(bounds) > 1 and job.rows - bounds[-1] < ROW_MULTIPLE:
            bounds.pop()
        raw = torch.empty(job.row_bytes * max(b - a for a, b in pairs(bounds, job.rows)), dtype=torch.uint8)
        for low, high in pairs(bounds, job.rows):
            assert job.start is not None
            view = raw[: (high - low) * job.row_bytes]
            read_range(source, memoryview(view.numpy().data), job.start + low * job.row_bytes)
            weight = view.view(dtype).view(high - low, columns).to(self.device, work)
            if original is not None:
                base = original[low:high].to(self.device, work)
                norms.error = (norms.error or 0.0) + float((weight - base).square().sum())
                weight = base if self.into_base else weight
            delta = self._delta(job, factors, low, high, work)
            if delta is not None:
                norms.update += float(torch.linalg.vector_norm(delta)) ** 2
                # Not on top of `view` where that is the source's own memory: verify and errors still read it.
                weight = weight + delta
            if edit.magnitude is not None:
                magnitude = self._mean([reader.read(edit.magnitude) for reader in self.adapters]).to(self.device, work)
                dimension = 0 if edit.transposed else 1
                norm = torch.linalg.norm(weight.T if edit.transposed else weight, dim=1)
                part = magnitude if edit.transposed else magnitude[job.first + low : job.first + high]
                weight = (part / norm).unsqueeze(dimension) * weight
            self._store(weight, job, low, destination, verify)
        if not verify:
            with self._lock:
                total = self.norms.setdefault(job.parameter, Norms())
                total.update += norms.update
                if norms.error is not None:
                    total.error = (total.error or 0.0) + norms.error

    def _delta(self, job: Rewrite, factors: Sequence, low: int, high: int, work: torch.dtype) -> torch.Tensor | None:
        """Rows of Σ p·s·B·A, or of a bias's update."""
        edit, total = job.edit, None
        start, stop = job.first + low, job.first + high
        for reader, weight, pair in zip(self.adapters, self.weights, factors, strict=True):
            if edit.bias is not None:
                delta = reader.read(edit.bias)[start:stop].unsqueeze(1).to(self.device, work) * edit.scale
            elif pair is not None:
                a, b = pair
                # Not Aᵀ·Bᵀ: the same sums in another order, and then the result is not PEFT's to the bit.
                delta = (
                    (b @ a[:, start:stop]).T * edit.scale if edit.transposed else (b[start:stop] @ a).mul_(edit.scale)
                )
            else:
                return None
            if len(self.adapters) == 1:
                return delta
            total = delta.mul_(weight) if total is None else total.add_(delta, alpha=weight)
        return total

    def _mean(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(tensors) == 1:
            return tensors[0]
        return sum((w * t.double() for w, t in zip(self.weights, tensors, strict=True)), torch.zeros(()).double())

    def _step(self, row_bytes: int) -> int:
        rows = (CHUNK_BYTES if self.device.type == "cpu" else BLOCK_BYTES) // row_bytes
        return max(rows // ROW_MULTIPLE, 1) * ROW_MULTIPLE

    def _store(self, rows: torch.Tensor, job: Rewrite, low: int, destination: int, verify: bool) -> None:
        dtype = job.tensor.torch_dtype
        result = rows.to("cpu", dtype).contiguous()
        smallest, largest = torch.aminmax(rows)
        limit = torch.finfo(dtype).max
        if not (-limit <= float(smallest) and float(largest) <= limit) and not torch.isfinite(result.float()).all():
            raise ValueError(
                f"`{job.tensor.name}` would have values that are NaN or beyond {dtype} after the merge. Look for damage "
                "in the full model, or save it in a wider dtype."
            )
        data = result.view(-1).view(torch.uint8).numpy().data
        at = job.to + low * job.row_bytes
        if not verify:
            write_range(destination, data, at)
            return
        written = bytearray(len(data))
        read_range(destination, memoryview(written), at)
        if written != data:
            raise RuntimeError(f"`{job.tensor.name}` in the result is not what the merge computes; it is damaged.")


def _select(parameter: torch.Tensor, job: Rewrite, columns: int) -> torch.Tensor:
    matrix = parameter if job.expert is None else parameter[job.expert]
    return matrix.reshape(-1, columns)[job.first : job.first + job.rows]


def pairs(bounds: Sequence[int], stop: int) -> Iterator[tuple[int, int]]:
    return zip(bounds, [*bounds[1:], stop], strict=True)
