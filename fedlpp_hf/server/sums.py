# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A round of secure aggregation at the server: it takes the sum of the updates, and no update."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..config.federated import FederatedConfig
from ..config.rules import trainable_keys
from ..privacy.clipping import check_norm
from ..privacy.secure_sums.fixed_point import unflatten_update
from ..privacy.secure_sums.rounds import RoundSum
from ..privacy.secure_sums.terms import SUM_BITS
from ..tensors.atomic import write_atomically
from ..tensors.files import TensorFile
from ..wire.encoding import decode_message, encode_message
from ..wire.messages import ClientFailure, ClientTask, ClientUpdate
from .admission import AcceptedUpdate, Admission


_FILE = "sum.safetensors"
_KIND = "round's sum"
_CLEAR = "it sent its update in the clear; secure_aggregation=True here, so set it at the client, too"


class SumAdmission(Admission):
    """[`Admission`] of a round whose updates come as one sum.

    Each client in the sum is taken to have sent the mean: whatever the weights, the mean of these is the mean. The sum is
    written down as soon as it is open, and a resumed round takes it from there: clients open a round's sum for one set of
    survivors alone.
    """

    def collect(
        self, tasks: Mapping[str, ClientTask], answers: Iterable[ClientUpdate | ClientFailure | RoundSum]
    ) -> tuple[dict[str, AcceptedUpdate], dict[str, str]]:
        file, task = self.updates_dir / _FILE, next(iter(tasks.values()))
        header = _read(file, task.federation_id, task.round)
        if header is None:
            self.forget()
            self.updates_dir.mkdir(parents=True)
            header = self._open(file, tasks, answers)
        self.traffic, self.report, self.rejected = header["traffic"], header["report"], header["rejected"]
        if not header["clients"]:
            return {}, header["rejected"]
        delta = TensorFile(file)
        updates = {
            client: AcceptedUpdate(None, {}, self.traffic[client]["bytes_up"], delta)
            for client in tasks
            if client in header["clients"]
        }
        return updates, header["rejected"]

    def sweep(self, done: int) -> None:
        file = self.updates_dir / _FILE
        if file.exists() and decode_message(_KIND, file.read_bytes())[0]["round"] > done:
            return  # opened, and not committed: the round that is redone takes it from there
        self.forget()

    def _open(
        self, file: Path, tasks: Mapping[str, ClientTask], answers: Iterable[ClientUpdate | ClientFailure | RoundSum]
    ) -> dict[str, Any]:
        """Wait for the sum and write it down; returns what is kept beside it."""
        traffic: dict[str, dict[str, Any]] = {
            client: {"bytes_down": task.num_bytes, "bytes_up": 0, "seconds": None} for client, task in tasks.items()
        }
        rejected: dict[str, str] = {}
        found: RoundSum | None = None
        for answer in answers:
            if isinstance(answer, RoundSum):
                found = answer
            elif answer.client_id not in tasks:
                rejected[answer.client_id] = "it was not asked in this round"
            else:
                rejected[answer.client_id] = answer.reason if isinstance(answer, ClientFailure) else _CLEAR
        header: dict[str, Any] = {"clients": [], "rejected": rejected, "traffic": traffic, "report": {}}
        if found is None:
            return header
        shapes = {key: self.shapes[key] for key in trainable_keys(self.args.aggregation, self.shapes)}
        delta = unflatten_update(found.opened.mean, shapes)
        if self.args.max_update_norm is not None:
            try:
                check_norm(delta, self.args.max_update_norm)
            except ValueError as error:
                # Of updates within the bound the mean is, too. Nobody can say whose is not.
                return header | {"rejected": rejected | dict.fromkeys(found.clients, f"of the mean, {error}")}
        for client, cost in traffic.items():
            cost["bytes_down"] += found.bytes_down.get(client, 0)
            cost["bytes_up"] += found.bytes_up.get(client, 0)
        header |= {
            "clients": list(found.clients),
            "report": {"sum": _describe(found, self.args.adds_noise)},
        }
        task = next(iter(tasks.values()))
        marks = {"federation_id": task.federation_id, "round": task.round}
        write_atomically(file, encode_message(_KIND, header | marks, delta))
        return header


def make_admission(
    args: FederatedConfig,
    adapter: Mapping[str, torch.Tensor],
    num_examples: Mapping[str, int | None],
    updates_dir: Path,
) -> Admission:
    """What decides which answers a round takes: the sum alone, under `secure_aggregation`.

    Args:
        args: The federation's options.
        adapter, num_examples, updates_dir: As [`Admission`] has them.
    """
    kind = SumAdmission if args.secure_aggregation else Admission
    return kind(args, adapter, num_examples, updates_dir)


def _describe(found: RoundSum, has_noise: bool) -> dict[str, Any]:
    """What the round's record says of its sum: all that was learned beside the mean update."""
    opened = found.opened
    return {
        "loss": opened.loss,
        "losses": opened.losses,
        "steps": opened.steps,
        "members": found.members,
        "threshold": found.threshold,
        "bits": SUM_BITS,
        **({} if has_noise else {"largest_error": found.resolution / 2}),
    }


def is_on_disk(updates_dir: Path, federation_id: str, number: int) -> bool:
    """Whether a round's sum was opened before the server was stopped: that round is taken from it."""
    return _read(updates_dir / _FILE, federation_id, number) is not None


def _read(file: Path, federation_id: str, number: int) -> dict[str, Any] | None:
    """What stands beside the sum of a round, if it was opened before the server was stopped."""
    if not file.exists():
        return None
    header, _ = decode_message(_KIND, file.read_bytes())
    return header if (header["federation_id"], header["round"]) == (federation_id, number) else None
