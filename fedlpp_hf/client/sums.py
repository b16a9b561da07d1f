# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A client's sums from round to round: one under way at most, and a ledger of those that it has helped to open."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..config.federated import FederatedConfig
from ..config.rules import trainable_keys
from ..privacy.secure_sums.client import RefusedError, SumClient
from ..privacy.secure_sums.fixed_point import make_contribution
from ..privacy.secure_sums.members import Identity
from ..privacy.secure_sums.terms import make_terms
from ..tensors.atomic import write_atomically
from ..wire.messages import ClientTask, ClientUpdate


LEDGER_FILE = "sums.json"


class SumLedger:
    """Which sums a client has helped to open, in a file that outlives its process.

    The sums of two sets of survivors of one round differ by the updates of single clients, so a client opens a round for one
    set alone, and no round before its last one. It does not even mask its update for another set: those who have not opened
    the round yet could open that sum without it.

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
        last, opened = self._read().get(federation_id, (0, ""))
        if number < last:
            raise RefusedError(
                f"this client has helped to open the sum of round {last} of this federation, and takes no part in round {number} "
                "again; start another federation"
            )
        if clients and number == last and clients != opened:
            raise RefusedError(
                f"this client has helped to open round {number} for other survivors; the two sums would tell updates apart"
            )

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
        entries = self._read()
        entries[federation_id] = number, survivors
        write_atomically(self.file, json.dumps(entries).encode(), mode=0o600)

    def _read(self) -> dict[str, tuple[int, str]]:
        if not self.file.exists():
            return {}
        try:
            entries = json.loads(self.file.read_text(encoding="utf-8"))
            return {federation: (int(number), str(survivors)) for federation, (number, survivors) in entries.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise RefusedError(
                "this client's ledger of sums is damaged, and without it no sum is opened; its log names the file"
            ) from error


class ClientSums:
    """The sums of one client.

    Args:
        args: The client's own options; the server's word does not change them.
        adapter: Gives keys and shapes of an update.
        directory: Where the ledger is kept.
        identity: The client's key, and those of the others, where it knows them.
    """

    def __init__(
        self,
        args: FederatedConfig,
        adapter: Mapping[str, torch.Tensor],
        directory: Path,
        identity: Identity | None = None,
    ):
        self.args, self.identity = args, identity
        self.shapes = {key: adapter[key] for key in trainable_keys(args.aggregation, adapter)}
        self.ledger = SumLedger(directory / LEDGER_FILE)
        self._client: SumClient | None = None

    def begin(self, task: ClientTask, update: ClientUpdate) -> bytes:
        """Make the keys of a new sum, with which the client answers its task. A sum that was under way is given up.

        Args:
            task: Of the client, as it was trained.
            update: What came of it.

        Raises:
            ValueError: if the update could overflow the sum.
            RefusedError: if a later round's sum was opened.
        """
        federation, number = task.federation_id, task.round
        self._client = None
        self.ledger.check(federation, number)
        size = sum(tensor.numel() for tensor in self.shapes.values())

        def admit(members: str) -> None:
            self.ledger.check(federation, number, members)

        def approve(survivors: str) -> None:
            self.ledger.enter(federation, number, survivors)

        self._client = SumClient(
            make_terms(self.args, task, size),
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
