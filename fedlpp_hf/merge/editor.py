# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The merge's arithmetic: new rows from old ones, chunk by chunk."""

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..tensors.files import TensorRange, read_range
from .locations import Edit
from .plan import MergePlan
from .shards import copy_range, find_difference, write_range
from .sources import AdapterReader, BaseReader, is_finite


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


@dataclass(frozen=True, slots=True)
class Product:
    """One adapter's part of an update: share · scale · B·A."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    share: float
    gram: torch.Tensor | None = None


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

    def base_name(self, parameter: str) -> str:
        """The base's name for a parameter; one that was tied before this merge has there that of its twin."""
        return next((stored for name, stored, _ in self.plan.added if name == parameter and stored), parameter)

    def reads_base(self, parameter: str) -> bool:
        """Whether Q(W) of a parameter is needed: to merge into it, or for the norm of E."""
        return self.base is not None and self.base.is_quantized(self.base_name(parameter))

    def takes_base(self, parameter: str) -> bool:
        """Whether a parameter becomes Q(W) + ΔW."""
        return self.into_base and self.reads_base(parameter)

    def edit_of(self, parameter: str) -> Edit | None:
        """What happens to a parameter; None where its bytes stay."""
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
        columns = job.row_bytes // dtype.itemsize
        if edit.value is not None:
            value = self._mean([reader.read(edit.value) for reader in self.adapters])
            result = _select(value, job, columns).to(dtype).contiguous()
            self._store(result, job, 0, destination, verify)
            return
        work = torch.float64 if len(self.adapters) > 1 or dtype == torch.float64 else torch.float32
        norms, original = Norms(), None
        if self.base is not None and self.reads_base(job.parameter):
            original = _select(self.base.read(self.base_name(job.parameter)), job, columns)
        several = len(self.adapters) > 1
        whole = several or (edit.magnitude is not None and edit.transposed)
        step = job.rows if whole else self._step(columns * work.itemsize)
        chunks = split_rows(job.rows, step)
        longest = max(high - low for low, high in chunks)
        raw = torch.empty(job.row_bytes * longest, dtype=torch.uint8)
        wide = torch.empty(longest, columns, dtype=work, device=self.device)
        spare = torch.empty_like(wide)  # allocating for each chunk costs more than the arithmetic
        one = [self._load_product(job, 0, work, columns)] if not several else []
        for low, high in chunks:
            assert job.start is not None
            bytes_ = raw[: (high - low) * job.row_bytes]
            read_range(source, bytes_.numpy().data, job.start + low * job.row_bytes)
            stored = bytes_.view(dtype).view(high - low, columns)
            in_memory = dtype == work and self.device.type == "cpu"
            weight = stored if in_memory else wide[: high - low].copy_(stored)
            if original is not None:
                base = original[low:high].to(self.device, work)
                norms.error = (norms.error or 0.0) + float(torch.linalg.vector_norm(weight - base)) ** 2
                if self.into_base:
                    weight.copy_(base)
            # Of several, one is in memory at a time, whatever their number; the rows are then all of the job's.
            update = (self._load_product(job, i, work, columns) for i in range(len(self.adapters))) if several else one
            norms.update += self._add_update_(weight, update, job, low, spare[: high - low])
            if edit.magnitude is not None:
                magnitude = self._mean([reader.read(edit.magnitude) for reader in self.adapters]).to(self.device, work)
                if edit.transposed:
                    weight.mul_(magnitude / torch.linalg.norm(weight.T, dim=1))
                else:
                    part = magnitude[job.first + low : job.first + high]
                    weight.mul_((part / torch.linalg.norm(weight, dim=1)).unsqueeze(1))
            if not in_memory:
                stored.copy_(weight)
            self._store(stored, job, low, destination, verify)
        if not verify:
            with self._lock:
                total = self.norms.setdefault(job.parameter, Norms())
                total.update += norms.update
                if norms.error is not None:
                    total.error = (total.error or 0.0) + norms.error

    def _load_product(self, job: Rewrite, index: int, work: torch.dtype, columns: int) -> Product | None:
        """One adapter's part of a parameter's update, or of a bias's; None where it has none."""
        edit, reader, share = job.edit, self.adapters[index], self.weights[index]
        if edit.bias is not None:
            a, b = torch.ones(1, columns), reader.read(edit.bias).unsqueeze(1)
        elif edit.key_a is not None:
            a, b = edit.load_factors(reader, job.expert)
        else:
            return None
        a, b = a.to(self.device, work), b.to(self.device, work)
        return Product(a, b, edit.scales[index], share, a @ a.T if len(self.adapters) == 1 else None)

    def _add_update_(
        self, weight: torch.Tensor, update: Iterable[Product | None], job: Rewrite, low: int, spare: torch.Tensor
    ) -> float:
        """Add the update's rows to `weight`; returns their squared norm."""
        start, stop = job.first + low, job.first + low + len(weight)
        if len(self.adapters) > 1:
            total = spare.zero_()
            for one in update:
                if one is not None:
                    total.add_(_rows(one, job, start, stop), alpha=one.scale * one.share)
            weight.add_(total)
            return float(torch.linalg.vector_norm(total)) ** 2
        (one,) = update
        if one is None:
            return 0.0
        if job.edit.transposed:
            total = spare.copy_(_rows(one, job, start, stop)).mul_(one.scale)
            weight.add_(total)
            return float(torch.linalg.vector_norm(total)) ** 2
        rows = one.b[start:stop]
        if weight.dtype != job.tensor.torch_dtype and math.frexp(one.scale)[0] == 0.5:
            # A power of two may go into a factor. The sum in one call need not be PEFT's to the bit, but it takes half the
            # time, and in a narrower container the last bit of float32 does not show.
            rows = rows * one.scale
            weight.addmm_(rows, one.a)
            return _square_norm(rows, one)
        weight.add_(torch.mm(rows, one.a, out=spare).mul_(one.scale))
        return _square_norm(rows, one) * one.scale**2

    def _mean(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(tensors) == 1:
            return tensors[0]
        return sum((w * t.double() for w, t in zip(self.weights, tensors, strict=True)), torch.zeros(()).double())

    def _step(self, row_bytes: int) -> int:
        """Rows of a chunk."""
        rows = (CHUNK_BYTES if self.device.type == "cpu" else BLOCK_BYTES) // row_bytes
        return max(rows // ROW_MULTIPLE, 1) * ROW_MULTIPLE

    def _store(self, result: torch.Tensor, job: Rewrite, low: int, destination: int, verify: bool) -> None:
        if not is_finite(result):
            raise ValueError(
                f"`{job.tensor.name}` would have values that are NaN or beyond {result.dtype} after the merge. Look for "
                "damage in the full model, or save it in a wider dtype."
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


def _rows(product: Product, job: Rewrite, start: int, stop: int) -> torch.Tensor:
    """Rows of B·A as the parameter is stored."""
    if job.edit.transposed:
        # Not Aᵀ·Bᵀ: the same sums in another order, and then the result is not PEFT's to the bit.
        return (product.b @ product.a[:, start:stop]).T
    return product.b[start:stop] @ product.a


def _square_norm(rows: torch.Tensor, product: Product) -> float:
    """‖B·A‖² = tr(BᵀB·AAᵀ) for some rows of B, without the product."""
    assert product.gram is not None
    return max(float(((rows.T @ rows).double() * product.gram.double()).sum()), 0.0)


def _select(parameter: torch.Tensor, job: Rewrite, columns: int) -> torch.Tensor:
    matrix = parameter if job.expert is None else parameter[job.expert]
    return matrix.reshape(-1, columns)[job.first : job.first + job.rows]


def split_rows(rows: int, step: int) -> list[tuple[int, int]]:
    """Chunks of `step` rows as (first, end); a last one too short for the same kernels joins the one before."""
    bounds = list(range(0, rows, step))
    if len(bounds) > 1 and rows - bounds[-1] < ROW_MULTIPLE:
        bounds.pop()
    return list(zip(bounds, [*bounds[1:], rows], strict=True))
