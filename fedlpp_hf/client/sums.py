# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A client's sums from round to round: one under way at most, and a ledger of those that it has helped to open."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config.federated import FederatedConfig
from ..config.rules import trainable_keys
from ..privacy.noise_shares import NoiseShares, compute_share_epsilon
from ..privacy.secure_sums.client import RefusedError, SumClient
from ..privacy.secure_sums.fixed_point import make_contribution
from ..privacy.secure_sums.members import Identity
from ..privacy.secure_sums.terms import LEAST_MEMBERS, SumTerms, make_terms
from ..tensors.atomic import write_atomically
from ..wire.messages import ClientTask, ClientUpdate


logger = logging.getLogger(__name__)

LEDGER_FILE = "sums.json"
_MOST_MASKED = 3  # updates of a round with noise: what a server that crashes may need


@dataclass(frozen=True, slots=True)
class OpenedRounds:
    """What a client has done in the sums of one federation.

    Args:
        last: Number of the last round that it has helped to open.
        survivors: Digest of those whose updates were in its sum.
        noises: Round, noise multiplier and colluders of each update that has left masked, with noise, in order. Others may have
            opened its sum without this client.
    """

    last: int = 0
    survivors: str = ""
    noises: Sequence[tuple[int, float, int]] = ()


class SumLedger:
    """Which sums a client has helped to open, in a file that outlives its process.

    The sums of two sets of survivors of one round differ by the updates of single clients, so a client opens a round for one
    set alone, and no round before its last one. It does not even mask its update for another set: those who have not opened
    the round yet could open that sum without it. With noise it masks its update of a round three times at most.

    Args:
        file: The ledger's.
    """

    def __init__(self, file: Path):
        self.file = file

    def check(self, federation_id: str, number: int, clients: str = "") -> None:
        """
        Args:
            federation_id: Of the federation.
            number: Of the round.
            clients: Digest of those whose updates may be in the sum, where they are known.

        Raises:
            RefusedError: if a later round was opened, or this one for others.
        """
        opened = self.find(federation_id)
        if number < opened.last:
            raise RefusedError(
                f"this client has helped to open the sum of round {opened.last} of this federation, and takes no part in round "
                f"{number} again; start another federation"
            )
        if clients and number == opened.last and clients != opened.survivors:
            raise RefusedError(
                f"this client has helped to open round {number} for other survivors; the two sums would tell updates apart"
            )

    def check_kind(self, federation_id: str, has_noise: bool) -> None:
        """
        Raises:
            RefusedError: if earlier rounds had noise and this one has none, or the reverse: no ε would hold for all of them.
        """
        entry = self.find(federation_id)
        if (entry.noises or entry.last) and has_noise != bool(entry.noises):
            raise RefusedError(
                f"earlier sums of this federation were {'with' if entry.noises else 'without'} noise of the clients, and this one is "
                f"{'with' if has_noise else 'without'}; start another federation"
            )

    def check_noise(self, federation_id: str, number: int) -> None:
        """
        Raises:
            RefusedError: if this round's update has left masked, with noise, as often as it may.
        """
        if sum(one == number for one, *_ in self.find(federation_id).noises) >= _MOST_MASKED:
            raise RefusedError(
                f"this client has masked its update of round {number} as often as it does, {_MOST_MASKED} times: each has other "
                "noise, and the mean of more would have too little; start another federation"
            )

    def note_noise(self, federation_id: str, number: int, noise: NoiseShares) -> None:
        """Note that an update is about to leave masked, with its share of the noise.

        It counts whether or not this client is asked to help to open the sum: a threshold of the others can open it.

        Raises:
            RefusedError: as [`check_noise`].
        """
        self.check_noise(federation_id, number)
        opened = self.find(federation_id)
        noises = [*opened.noises, (number, noise.multiplier, noise.colluders)]
        self._write(federation_id, replace(opened, noises=noises))

    def enter(self, federation_id: str, number: int, survivors: str) -> None:
        """Note a sum that is about to be opened, before the first share leaves.

        Args:
            federation_id: Of the federation.
            number: Of the round.
            survivors: Digest of those whose updates are in it.

        Raises:
            RefusedError: if this round was opened for others, or a later one was.
        """
        self.check(federation_id, number, survivors)
        self._write(federation_id, replace(self.find(federation_id), last=number, survivors=survivors))

    def find(self, federation_id: str) -> OpenedRounds:
        """What this client has done in a federation.

        Raises:
            RefusedError: if the file is damaged.
        """
        return self._read().get(federation_id, OpenedRounds())

    def _write(self, federation_id: str, entry: OpenedRounds) -> None:
        entries = self._read() | {federation_id: entry}
        values = {name: [entry.last, entry.survivors, list(entry.noises)] for name, entry in entries.items()}
        write_atomically(self.file, json.dumps(values).encode(), mode=0o600)

    def _read(self) -> dict[str, OpenedRounds]:
        if not self.file.exists():
            return {}
        try:
            entries = json.loads(self.file.read_text(encoding="utf-8"))
            return {federation: _read_entry(*entry) for federation, entry in entries.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise RefusedError(
                "this client's ledger of sums is damaged, and without it no sum is opened; its log names the file"
            ) from error


def _read_entry(last: Any, survivors: Any, noises: Any = ()) -> OpenedRounds:
    """An entry of the file; those of older versions have no noise."""
    read = [(int(number), float(multiplier), int(colluders)) for number, multiplier, colluders in noises]
    return OpenedRounds(int(last), str(survivors), read)


class ClientSums:
    """The sums of one client.

    Args:
        args: The client's own options; the server's word does not change them.
        adapter: Gives keys and shapes of an update.
        directory: Where the ledger is kept.
        identity: The client's key, and those of the others, where it knows them.
        min_clients: Members below which it takes no part in a sum, by its policy.
    """

    def __init__(
        self,
        args: FederatedConfig,
        adapter: Mapping[str, torch.Tensor],
        directory: Path,
        identity: Identity | None = None,
        min_clients: int | None = None,
    ):
        self.args, self.identity, self.least = args, identity, max(min_clients or 0, LEAST_MEMBERS)
        self.shapes = {key: adapter[key] for key in trainable_keys(args.aggregation, adapter)}
        self.ledger = SumLedger(directory / LEDGER_FILE)
        self._client: SumClient | None = None

    def begin(self, task: ClientTask, update: ClientUpdate) -> bytes:
        """Make the keys of a new sum, with which the client answers its task. A sum that was under way is given up.

        Args:
            task: Of the client, as it was trained.
            update: What came of it.

        Raises:
            ValueError: if the update could overflow the sum, or the task's noise can't be added or accounted for.
            RefusedError: if a later round's sum was opened, the update was masked with noise as often as it may, or only some of
                the federation's rounds have noise.
        """
        federation, number = task.federation_id, task.round
        self._client = None
        self.ledger.check(federation, number)
        size = sum(tensor.numel() for tensor in self.shapes.values())
        terms = replace(make_terms(self.args, task, size), least=self.least)
        self.ledger.check_kind(federation, terms.noise is not None)
        if terms.noise is not None:
            self.ledger.check_noise(federation, number)
        spent = self._describe_spent(task, terms)

        def admit(members: str) -> None:
            self.ledger.check(federation, number, members)
            if terms.noise is not None:
                self.ledger.note_noise(federation, number, terms.noise)
                logger.info(spent)

        def approve(survivors: str) -> None:
            self.ledger.enter(federation, number, survivors)

        self._client = SumClient(
            terms,
            update.client_id,
            make_contribution(update, self.shapes),
            self.identity,
            admit,
            approve,
        )
        return self._client.advertise()

    def answer(self, client_id: str, step: str, request: bytes) -> bytes:
        """The answer to a request of the sum under way; see [`SumClient.answer`].

        Raises:
            RefusedError: as there, and if no sum of this client is under way: its process was restarted.
        """
        if self._client is None or self._client.client_id != client_id:
            raise RefusedError("no sum of this client is under way; was it restarted since it trained?")
        return self._client.answer(step, request)

    def _describe_spent(self, task: ClientTask, terms: SumTerms) -> str:
        """What the log says when the update leaves: ε of all sums that may have it, opened or not. Nothing without noise.

        Raises:
            ValueError: for a δ out of range, or without dp-accounting.
        """
        noise, delta = terms.noise, task.options.share_delta
        if noise is None:
            return ""
        noises = [(one, colluders) for _, one, colluders in self.ledger.find(task.federation_id).noises]
        noises.append((noise.multiplier, noise.colluders))
        # A sum of less noise for fewer colluders holds against no more of them.
        colluders = min(colluders for _, colluders in noises)
        sums = Counter(NoiseShares(one, colluders, noise.values) for one, _ in noises)
        return (
            f"Round {task.round}: this client's update leaves masked, with its share of the noise, noise multiplier "
            f"{noise.multiplier:.4g}. If no more than {colluders} of the others help the server, the {sums.total()} sums of this "
            f"federation that may have it spend ε = {compute_share_epsilon(sums, delta):.3f} at δ = {delta:g}."
        )
