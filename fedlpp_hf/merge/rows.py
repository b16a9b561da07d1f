# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The merge's arithmetic: new rows from old ones, chunk by chunk."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..tensors.files import read_range
from .adapter_reader import is_finite
from .jobs import BLOCK_BYTES, ROW_MULTIPLE, Rewrite, split_rows
from .plan import MergeInputs
from .report import Norms


# Small enough that a chunk, its update and its result stay in a core's cache; large enough for the call overhead.
CHUNK_BYTES = 1 << 20
PADDING = 16  # values between two rows


@dataclass(frozen=True, slots=True)
class Product:
    """One adapter's part of an update: share · scale · B·A. `gram` is A·Aᵀ, where there is one adapter."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    share: float
    gram: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class RowProducer:
    """Computes new rows, the same ones each time; safe to share between threads."""

    inputs: MergeInputs
    device: torch.device

    def produce(self, job: Rewrite, source: int, norms: Norms) -> Iterator[tuple[int, torch.Tensor]]:
        """Compute the rows of a job from those in the file `source`, and add their norms to `norms`.

        Yields chunks of rows with the number of their first row in the job. A chunk is overwritten by the next one.

        Raises:
            ValueError: if a result is not finite.
        """
        for low, rows in self._compute(job, source, norms):
            if not is_finite(rows):
                raise ValueError(
                    f"`{job.tensor.name}` would have values that are NaN or beyond {rows.dtype} after the merge. Look for "
                    "damage in the full model, or save it in a wider dtype."
                )
            yield low, rows

    def _compute(self, job: Rewrite, source: int, norms: Norms) -> Iterator[tuple[int, torch.Tensor]]:
        edit, dtype = job.edit, job.tensor.torch_dtype
        columns, several = job.row_bytes // dtype.itemsize, len(self.inputs.adapters) > 1
        value = None
        if edit.value is not None:
            value = self._average([reader.read(edit.value) for reader in self.inputs.adapters])
            value = _select(value, job, columns).to(
                dtype, copy=True
            )  # a weight of the model, before anything is added
            if not edit.adds:
                yield 0, value
                return
        work = torch.float64 if several or dtype == torch.float64 else torch.float32
        original = None
        if self.inputs.base is not None and self.inputs.reads_base(job.piece.parameter):
            name = self.inputs.base_name(job.piece.parameter)
            original = _select(self.inputs.base.read(name), job, columns)
        whole = several or (edit.magnitude is not None and edit.transposed)
        chunks = split_rows(job.piece.rows, job.piece.rows if whole else self._chunk_rows(columns * work.itemsize))
        longest = max(high - low for low, high in chunks)
        raw = torch.empty(job.row_bytes * longest, dtype=torch.uint8)
        # Allocating for each chunk costs more than the arithmetic.
        wide, spare = (self._make_rows(longest, columns, work) for _ in range(2))
        one = [] if several else [self._load_product(job, 0, work, columns)]
        for low, high in chunks:
            if value is not None:
                stored = value[low:high]
            else:
                data = raw[: (high - low) * job.row_bytes]
                read_range(source, data.numpy().data, job.start + low * job.row_bytes)
                stored = data.view(dtype).view(high - low, columns)
            in_memory = dtype == work and self.device.type == "cpu"
            weight = stored if in_memory else wide[: high - low].copy_(stored)
            if original is not None:
                base = original[low:high].to(self.device, work)
                norms.add_(Norms(error=float(torch.linalg.vector_norm(weight - base)) ** 2))
                if self.inputs.base_weight:
                    weight.lerp_(base, self.inputs.base_weight)
            # Of several, one is in memory at a time, whatever their number; the rows are then all of the job's.
            count = len(self.inputs.adapters)
            products = (self._load_product(job, i, work, columns) for i in range(count)) if several else one
            norms.update += self._add_update_(weight, products, job, low, spare[: high - low])
            if edit.magnitude is not None:
                self._rescale_(weight, job, low)
            if not in_memory:
                stored.copy_(weight)
            yield low, stored

    def _make_rows(self, count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        # Rows of 2048 or 4096 values that follow each other share few places of the cache; a product then takes three times as
        # long at rank 8. The bits are the same.
        return torch.empty(count, columns + PADDING, dtype=dtype, device=self.device)[:, :columns]

    def _chunk_rows(self, row_bytes: int) -> int:
        rows = (CHUNK_BYTES if self.device.type == "cpu" else BLOCK_BYTES) // row_bytes
        return max(rows // ROW_MULTIPLE, 1) * ROW_MULTIPLE

    def _load_product(self, job: Rewrite, index: int, work: torch.dtype, columns: int) -> Product | None:
        """One adapter's part of a parameter's update, or of a bias's; None where it has none."""
        edit, reader, share = job.edit, self.inputs.adapters[index], self.inputs.weights[index]
        if edit.bias is not None:
            a, b = torch.ones(1, columns), reader.read(edit.bias).unsqueeze(1)
        elif edit.key_a is not None:
            a, b = edit.load_factors(reader, job.piece.expert)
        else:
            return None
        a, b = a.to(self.device, work), b.to(self.device, work)
        gram = a @ a.T if len(self.inputs.adapters) == 1 else None
        return Product(a, b, edit.scales[index], share, gram)

    def _add_update_(
        self, weight: torch.Tensor, products: Iterable[Product | None], job: Rewrite, low: int, spare: torch.Tensor
    ) -> float:
        """Add the update's rows to `weight`; returns their squared norm."""
        start, stop = job.piece.offset + low, job.piece.offset + low + len(weight)
        if len(self.inputs.adapters) > 1:
            total = spare.zero_()
            for product in products:
                if product is not None:
                    total.add_(_multiply(product, job, start, stop), alpha=product.scale * product.share)
            weight.add_(total)
            return float(torch.linalg.vector_norm(total)) ** 2
        (one,) = products
        if one is None:
            return 0.0
        if job.edit.transposed:
            total = spare.copy_(_multiply(one, job, start, stop)).mul_(one.scale)
            weight.add_(total)
            return float(torch.linalg.vector_norm(total)) ** 2
        rows = one.b[start:stop]
        if weight.dtype != job.tensor.torch_dtype and math.frexp(one.scale)[0] == 0.5:
            # A power of two may go into a factor. The sum in one call need not be bit-identical to PEFT's, but it takes
            # half the time, and in a narrower dtype the last bit of float32 does not show.
            rows = rows * one.scale
            weight.addmm_(rows, one.a)
            return _square_norm(rows, one)
        weight.add_(torch.mm(rows, one.a, out=spare).mul_(one.scale))
        return _square_norm(rows, one) * one.scale**2

    def _rescale_(self, weight: torch.Tensor, job: Rewrite, low: int) -> None:
        """Give the rows DoRA's magnitudes (arXiv 2402.09353, eq. 5)."""
        assert job.edit.magnitude is not None
        magnitude = self._average([reader.read(job.edit.magnitude) for reader in self.inputs.adapters])
        magnitude = magnitude.to(self.device, weight.dtype)
        if job.edit.transposed:
            weight.mul_(magnitude / torch.linalg.norm(weight.T, dim=1))
            return
        start = job.piece.offset + low
        part = magnitude[start : start + len(weight)]
        weight.mul_((part / torch.linalg.norm(weight, dim=1)).unsqueeze(1))

    def _average(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(tensors) == 1:
            return tensors[0]
        weighted = (w * t.double() for w, t in zip(self.inputs.weights, tensors, strict=True))
        return sum(weighted, torch.zeros(()).double())


def _multiply(product: Product, job: Rewrite, start: int, stop: int) -> torch.Tensor:
    """Rows of B·A as the parameter is stored."""
    if job.edit.transposed:
        # Not Aᵀ·Bᵀ: the same sums in another order, which are not bit-identical to PEFT's.
        return (product.b @ product.a[:, start:stop]).T
    return product.b[start:stop] @ product.a


def _square_norm(rows: torch.Tensor, product: Product) -> float:
    """‖B·A‖² = tr(BᵀB·AAᵀ) for some rows of B, without the product."""
    assert product.gram is not None
    return max(float(((rows.T @ rows).double() * product.gram.double()).sum()), 0.0)


def _select(parameter: torch.Tensor, job: Rewrite, columns: int) -> torch.Tensor:
    matrix = parameter if job.piece.expert is None else parameter[job.piece.expert]
    return matrix.reshape(-1, columns)[job.piece.offset : job.piece.offset + job.piece.rows]
