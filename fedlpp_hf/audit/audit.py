# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The model-privacy audit: what clients, alone and together, can make of what they were sent."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..processes.measurement import RowMeasures, choose_rows, measure_rows
from ..tensors.adapters import load_adapter_
from .attacks import Adapter, combine_proxies, find_broadcasts, pool_rows, restore_proxies
from .data_audit import audit_data
from .exposed import list_sent
from .report import AuditReport, CoalitionAudit
from .requirements import check_auditable
from .search import TrainingSearch, digest_adapter
from .stolen_value import estimate_exposure, estimate_interval, estimate_stolen_value


def audit_federation(trainer: Any, coalitions: Sequence[Sequence[str]] | None = None) -> AuditReport:
    """Attack the federation that `trainer.train()` has run, with what its clients hold.

    `trainer` is a [`FederatedMixin`] trainer. `coalitions` are lists of clients that pool proxies and rows; by
    default the client with the most proxies and rows, and the half of all clients with the most.

    Raises:
        ValueError: if the federation can't be audited, or a client is unknown.
        RuntimeError: if it has not been run.
    """
    check_auditable(trainer)
    if trainer.server is None or trainer.server.store.latest() is None:
        raise RuntimeError("There is no federation to audit; call `train()` first.")
    began = time.perf_counter()
    args, server = trainer.args, trainer.server
    coalitions = _choose_coalitions(trainer) if coalitions is None else coalitions
    for client in {client for coalition in coalitions for client in coalition}:
        if client not in trainer.client_datasets:
            raise ValueError(f"Client {client!r} is unknown; expected some of {', '.join(trainer.client_datasets)}.")
    rows = choose_rows(trainer.eval_dataset, args.audit_rows, args.seed)
    initial, _ = server.store.load(0)
    before = trainer.owner.measure_rows(initial)
    after = trainer.owner.measure_rows(server.adapter, server.state.residual, server.state.base_weight)
    scale = _Scale(trainer, rows)
    base = scale.measure(dict(trainer.guard.initial))
    if base is None or not np.isfinite(before.loss).all():
        raise ValueError(
            "Some evaluation rows have no finite loss on the untrained model; are all of their labels -100? Drop them "
            "from eval_dataset, and resume: the rounds are committed."
        )
    exposure = estimate_exposure({"base": base}, before, args.seed)
    audits = [_audit_coalition(trainer, scale, sorted(coalition), before, after) for coalition in coalitions]
    notes = []
    if not Path(args.full_model).exists():
        notes.append(
            "The full model was loaded by a name of the Hub. If it is public there, its base protects nothing."
        )
    if not args.broadcasts:
        notes.append("Nothing was broadcast: clients have the base, and what their own rows give them.")
    if not after.loss.mean() < before.loss.mean():  # NaN is no gain either
        notes.append(
            "The server's model is no better than the owner's was before the federation. Stolen value is then a share of "
            "what the full model is worth beyond the base, and not of anything that was learned."
        )
    return AuditReport(
        federation_id=server.federation_id,
        base_fingerprint=server.base_fingerprint,
        num_clients=len(server.num_examples),
        num_rows=len(rows),
        num_rows_available=len(trainer.eval_dataset),
        steps=args.audit_longer * args.audit_steps,
        seed=args.seed,
        threshold=args.audit_threshold,
        before=_average(before),
        server=_average(after),
        exposure=exposure,
        coalitions=audits,
        sent=list_sent(trainer),
        notes=notes,
        data=audit_data(trainer) if args.audit_data else None,
        seconds=time.perf_counter() - began,
        intervals=_keep_known(
            base=estimate_interval({"base": base}, after, args.seed),
            before=estimate_interval({"before": before}, after, args.seed),
        ),
    )


def _choose_coalitions(trainer: Any) -> list[list[str]]:
    server, records = trainer.server, trainer.server.store.records()

    def strength(client: str) -> tuple[int, int]:
        proxies = find_broadcasts(records, [client], server.args.broadcasts)
        return len(proxies), len(trainer.client_datasets[client])

    strongest = sorted(trainer.client_datasets, key=strength, reverse=True)
    count = len(strongest)
    return [strongest[:1]] + ([strongest[: count // 2]] if count > 3 else [])


class _Scale:
    """Measures adapters on the base, each once: clients with the same proxies can do the same with them."""

    def __init__(self, trainer: Any, rows: Any):
        self.trainer, self.rows = trainer, rows
        self._known: dict[bytes, RowMeasures] = {}
        self._metrics: dict[bytes, dict[str, float]] = {}

    def measure(self, adapter: Adapter) -> RowMeasures | None:
        """The adapter's rows, or None if it, or its loss on one of them, is not finite."""
        if not all(bool(tensor.isfinite().all()) for tensor in adapter.values()):
            return None
        key = digest_adapter(adapter)
        if key not in self._known:
            load_adapter_(self.trainer.guard.parameters, adapter)
            self._known[key] = measure_rows(self.trainer, self.rows)
        found = self._known[key]
        return found if np.isfinite(found.loss).all() else None

    def evaluate(self, adapter: Adapter) -> dict[str, float]:
        """The adapter's metrics on the whole evaluation dataset."""
        key = digest_adapter(adapter)
        if key not in self._metrics:
            self._metrics[key] = self.trainer.evaluate_proxy(adapter)
        return dict(self._metrics[key])

    def find_loss(self, adapter: Adapter) -> float:
        """The adapter's mean loss, infinite if `measure` finds none."""
        found = self.measure(adapter)
        return math.inf if found is None else float(found.loss.mean())

    def measure_all(self, adapters: Mapping[str, Adapter], diverged: list[str]) -> dict[str, RowMeasures]:
        """Those of `adapters` that are finite; the names of the others are added to `diverged`."""
        found = {name: self.measure(adapter) for name, adapter in adapters.items()}
        diverged += [name for name, rows in found.items() if rows is None]
        return {name: rows for name, rows in found.items() if rows is not None}


def _audit_coalition(
    trainer: Any, scale: _Scale, clients: list[str], before: RowMeasures, server: RowMeasures
) -> CoalitionAudit:
    rows = pool_rows([trainer.client_datasets[client] for client in clients])
    training = TrainingSearch(trainer, rows, scale.find_loss)
    base = dict(trainer.guard.initial)
    local_only = {"untouched base": base} | training.search({"base": base})
    proxies = restore_proxies(trainer.server, clients)
    attacks = combine_proxies(proxies)
    attacks |= training.search(
        {name: attacks[name] for name in ("last proxy", "mean of later half") if name in attacks}
    )
    diverged: list[str] = []
    measured = scale.measure_all(attacks, diverged)
    references = scale.measure_all(local_only, diverged)
    stolen = {
        measure: estimate_stolen_value(
            {name: found.measures[measure] for name, found in measured.items()},
            {name: found.measures[measure] for name, found in references.items()},
            values,
            measure,
            trainer.args.seed,
        )
        for measure, values in server.measures.items()
    }
    best = stolen["loss"].best_attack
    return CoalitionAudit(
        clients=clients,
        num_proxies=len(proxies),
        attacks={name: _average(found) for name, found in measured.items()},
        local_only={name: _average(found) for name, found in references.items()},
        stolen=stolen,
        healed=estimate_exposure(references, before, trainer.args.seed),
        metrics=scale.evaluate((local_only | attacks)[best]),
        diverged=diverged,
        intervals=_keep_known(
            attacker=estimate_interval(measured or references, server, trainer.args.seed),
            local_only=estimate_interval(references, server, trainer.args.seed),
        ),
    )


def _keep_known(**intervals: tuple[float, float] | None) -> dict[str, list[float]]:
    return {name: list(interval) for name, interval in intervals.items() if interval is not None}


def _average(found: RowMeasures) -> dict[str, float]:
    return {measure: float(values.mean(dtype=np.float64)) for measure, values in found.measures.items()}
