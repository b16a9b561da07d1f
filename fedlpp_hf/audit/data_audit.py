# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The audit of the data side: what the server could read off one client's update, tried on the owner's own rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from ..privacy.accounting import ClientSampling, compute_epsilon
from ..privacy.client_level import ClientMechanism
from ..processes.measurement import choose_rows, replaced_options
from ..server.client_dp import ClientDP
from ..tensors.adapters import global_norm
from ..tensors.codebooks import FULL_PRECISION
from ..wire.compression import decompress_update
from .attacks import Adapter
from .canaries import CanarySettings, Contribution, audit_canaries
from .data_report import CanaryAudit, DataAudit, InversionFigures, MembershipFigures
from .inversion import invert_update
from .membership import ATTACKS, compare_scores
from .observed import ObservedUpdate
from .recovery import score_recovery, score_tokens
from .sequences import InversionLimits


_CLIENT = "audit"
_MOST_ROWS = 8  # that an attack looks for
_LONGEST = 64  # tokens of a row that is attacked
_CANARY_VALUES = 2000  # of a canary's update; more make the estimate no better
_FEWEST = 8  # rows, below which no share means anything
# The root mean square error of an update's values, as a share of theirs (Gaussian blocks; DESIGN: 0.57, 0.20, 0.09).
_QUANTIZATION_ERRORS = {1: 0.8, 2: 0.57, 3: 0.2, 4: 0.1, 8: 0.01, FULL_PRECISION: 0.0}


def audit_data(trainer: Any) -> DataAudit:
    """Give half of the evaluation rows to a made-up client of one more round, and attack its update; the federation stays as it is.

    Inversion is tried on an update of one step, on that of a whole local run, and on noise; by spans alone, as the search by optimization
    takes minutes even on a small model. Membership compares the rows that the
    client had with the other half, on the server's model after its update, alone and among a round's clients.
    """
    args = trainer.args
    rows = choose_rows(trainer.eval_dataset, args.audit_rows, args.seed)
    order = np.random.default_rng([args.seed, 1]).permutation(len(rows))
    members, others = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    if len(others) < _FEWEST or not hasattr(rows, "select"):
        return DataAudit(
            [], [], notes=[f"Updates were not attacked: it takes {2 * _FEWEST} evaluation rows, in one Dataset."]
        )
    notes: list[str] = []
    start = _find_start(trainer)
    inversions = _audit_inversion(trainer, rows.select(members), start, notes)
    delta = _train(trainer, rows.select(members), start)
    membership = _audit_membership(trainer, delta, start, members, others)
    canaries = None
    if trainer.server.dp is None:
        notes.append("There is no noise on updates, and so no ε to compare with canary clients.")
    else:
        canaries = audit_noise(trainer.server.dp, trainer.server.store.records(), args.seed)
        notes.append(
            "The client's update is attacked as the server gets it, before the noise. The canary clients go through the federation's "
            "own clip, noise and divisor, at the noise of all its rounds."
        )
    return DataAudit(inversions, membership, canaries, notes)


def audit_noise(dp: ClientDP, records: Sequence[Mapping[str, Any]], seed: int) -> CanaryAudit:
    """ε that canary clients find in a federation's mechanism, beside the accounted one.

    They are drawn as its clients are, or, where each round draws a fixed number, are in every round, whose ε is then the one to compare
    with. Each sends ten times the clip.

    Args:
        dp: Of the federation.
        records: Of its rounds.
        seed: Of the canaries.
    """
    poisson = dp.sampling.kind == "poisson"
    sampling = dp.sampling if poisson else ClientSampling("poisson", 1, 1)
    releases = max((record["privacy"]["releases"] for record in records if "privacy" in record), default=1)
    mechanism = ClientMechanism(dp.noise_multiplier, dp.sampling.per_round, dp.args.clip_quantile)
    settings = CanarySettings(
        _CANARY_VALUES, dp.clip, num_rounds=releases, sampling_rate=sampling.rate, length=10, seed=seed
    )

    def release(number: int, contributions: Sequence[Contribution]) -> np.ndarray:
        deltas = [{"values": torch.from_numpy(entry.update)} for entry in contributions]
        shapes = {"values": torch.Size([_CANARY_VALUES])}
        return mechanism.release(deltas, [0.5] * len(deltas), dp.clip, shapes).mean["values"].numpy()

    accounted = compute_epsilon(dp.noise_multiplier, sampling, releases, dp.delta)
    return audit_canaries(release, settings, dp.delta, accounted)


def _find_start(trainer: Any) -> Adapter:
    """What a client of one more round would start from."""
    held = trainer.server.client_adapter()
    return dict(trainer.guard.initial if held is None else held)


def _train(trainer: Any, rows: Any, start: Mapping[str, torch.Tensor], **options: Any) -> Adapter:
    """Δ of a client's run on `rows`, as the server decodes it."""
    task = trainer.server.make_task(trainer.args.num_rounds, _CLIENT, start)
    task = replace(task, federation_id=_CLIENT, round=1, num_rounds=1)  # it keeps nothing from rounds before
    with replaced_options(trainer.args, options):
        return decompress_update(trainer.train_client(task, rows).delta, start)


def _audit_inversion(
    trainer: Any, rows: Any, start: Mapping[str, torch.Tensor], notes: list[str]
) -> list[InversionFigures]:
    texts = _read_tokens(rows)
    if texts is None:
        notes.append("Updates were not inverted: rows have no `input_ids` of one sequence of tokens.")
        return []
    short = [
        place for place in np.argsort([len(text) for text in texts], kind="stable") if len(texts[place]) <= _LONGEST
    ]
    if not short:
        notes.append(f"Updates were not inverted: every row is longer than {_LONGEST} tokens.")
        return []
    args, found = trainer.args, []
    batch = sorted(int(place) for place in short[: args.train_batch_size])
    everything = {"whole local run": (rows, {}), "one step": (rows.select(batch), {"max_steps": 1})}
    for run, (given, options) in reversed(everything.items()):
        delta = _train(trainer, given, start, **options)
        behind = [texts[place] for place in batch] if options else texts
        one_step = (
            bool(options) and args.optim.startswith("adamw") and args.warmup_steps == 0 and not args.clip_update_norm
        )
        seen = ObservedUpdate(
            delta,
            start,
            relative_noise=_QUANTIZATION_ERRORS.get(args.update_bits, 0.0),
            adam_rate=args.learning_rate if one_step else None,
        )
        tries = {run: seen} | ({"noise": _make_noise(seen, args.seed)} if options else {})
        for name, update in tries.items():
            try:
                found.append(_invert(trainer, name, update, behind))
            except ValueError as error:
                notes.append(f"Updates were not inverted: {error}")
                return found
    return found


def _invert(trainer: Any, name: str, update: ObservedUpdate, behind: Sequence[Sequence[int]]) -> InversionFigures:
    begin, end = ({text[place] for text in behind} for place in (0, -1))
    # What every row begins or ends with, the owner knows from its own.
    first, last = (min(tokens) if len(tokens) == 1 and len(behind) > 1 else None for tokens in (begin, end))
    longest = min(max(map(len, behind)), _LONGEST)
    limits = InversionLimits(min(len(behind), _MOST_ROWS), longest, first, last, evaluations=0)
    inversion = invert_update(trainer.model, update, trainer.guard.peft_config, limits)
    ignored = {token for token in (first, last) if token is not None}
    tokens = score_tokens(behind, {token for place in inversion.tokens for token in place}, ignored)
    scores = asdict(score_recovery(behind, inversion.rows, ignored))
    different = len({token for text in behind for token in text})
    return InversionFigures(name, len(behind), different, " and ".join(dict.fromkeys(inversion.by)), tokens, **scores)


def _make_noise(update: ObservedUpdate, seed: int) -> ObservedUpdate:
    generator = torch.Generator().manual_seed(seed)
    noise = {key: torch.randn(value.shape, generator=generator) for key, value in update.delta.items()}
    scale = global_norm(update.delta) / global_norm(noise)
    return ObservedUpdate({key: scale * value for key, value in noise.items()}, update.start, noise=scale)


def _read_tokens(rows: Any) -> list[list[int]] | None:
    """The rows' tokens without padding; None where rows are something else."""
    if "input_ids" not in getattr(rows, "column_names", ()):
        return None
    found = []
    for row in rows:
        ids = [int(token) for token in np.asarray(row["input_ids"]).ravel()]
        mask = np.asarray(row.get("attention_mask", [1] * len(ids))).ravel()
        if len(mask) != len(ids):
            return None
        found.append([token for token, kept in zip(ids, mask, strict=True) if kept])
    return found if all(found) else None


def _audit_membership(
    trainer: Any, delta: Adapter, start: Mapping[str, torch.Tensor], members: np.ndarray, others: np.ndarray
) -> list[MembershipFigures]:
    server, owner, seed = trainer.server, trainer.owner, trainer.args.seed
    clients = trainer.args.clients_per_round or len(trainer.client_datasets)
    before = owner.measure_rows(server.adapter, server.state.residual, server.state.base_weight).loss
    found = []
    for share, label in {
        1.0: "server's model + the client's update",
        1 / clients: f"the same as one of {clients} clients",
    }.items():
        adapter = _add_update(trainer, delta, start, share)
        after = owner.measure_rows(adapter, server.state.residual, server.state.base_weight).loss
        if not (np.isfinite(before).all() and np.isfinite(after).all()):
            continue
        for attack, score in ATTACKS.items():
            scores = score(before, after)
            found.append(MembershipFigures(label, compare_scores(attack, scores[members], scores[others], seed)))
    return found


def _add_update(trainer: Any, delta: Adapter, start: Mapping[str, torch.Tensor], share: float) -> Adapter:
    """The server's adapter with a client of weight `share` more; where nothing is broadcast, updates are whole ways from `start`."""
    adapter = trainer.server.adapter
    if trainer.args.broadcasts:
        return {key: value + share * delta[key] if key in delta else value for key, value in adapter.items()}
    return {
        key: start[key] + (1 - share) * (value - start[key]) + share * delta[key] if key in delta else value
        for key, value in adapter.items()
    }
