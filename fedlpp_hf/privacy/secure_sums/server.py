# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The server's side of one sum, without a transport. What it holds of a single client is masked, and only while it adds it."""

from collections.abc import Mapping

import numpy as np

from .fixed_point import EXTRA_WORDS, OpenedSum, decode_sum
from .members import (
    Roster,
    commit_own_mask,
    derive_mask_key,
    derive_own_mask,
    find_sign,
)
from .messages import (
    MemberKeys,
    limit_members,
    read_digest,
    read_id,
    read_members,
    read_message,
    read_sealed,
    read_share,
    read_signature,
    read_words,
    write_message,
)
from .primitives import add_mask_, agree, combine_shares, digest, make_public_key
from .terms import LEAST_MEMBERS, MOST_MEMBERS, SumTerms


class TooFewError(RuntimeError):
    """Too few clients are left for the sum: nothing is opened."""


class SumServer:
    """One round's sum. For each phase, `add_…` takes a client's answer, and the method after it closes the phase.

    The first answer of a client to a phase counts; what comes after the phase is closed is refused.

    Args:
        terms: Of the round.
    """

    def __init__(self, terms: SumTerms):
        self.terms = terms
        self.roster: Roster | None = None
        self._keys: dict[str, MemberKeys] = {}
        self._sealed: dict[str, dict[str, bytes]] = {}  # by sender, then recipient
        self._total = np.zeros(terms.size + EXTRA_WORDS, np.uint32)
        self.survivors: list[str] = []
        self._signatures: dict[str, bytes] = {}
        self._shares: dict[str, dict[str, bytes]] = {}  # by holder, then by whose seed it is of
        self._phase = "keys"

    def add_keys(self, client: str, data: bytes) -> None:
        """
        Raises:
            ValueError: if the client answered before, or its answer breaks a rule. So do all `add_…`.
        """
        self._check(client, "keys", self._keys)
        fields = {"client_id": read_id, "keys": MemberKeys.from_json}
        said = read_message("keys", self.terms, data, fields, limit_members(1))
        _check_client(client, said)
        taken = {key for keys in self._keys.values() for key in keys.to_json()[:3]}
        if len(self._keys) == MOST_MEMBERS or not taken.isdisjoint(said["keys"].to_json()[:3]):
            raise ValueError(f"its keys are those of another client, or there are {MOST_MEMBERS} members already")
        self._keys[client] = said["keys"]

    def make_rosters(self) -> dict[str, bytes]:
        """Close the first phase: who has sent keys is a member.

        Raises:
            TooFewError: if they are too few.
        """
        if len(self._keys) < LEAST_MEMBERS:
            raise TooFewError(f"{len(self._keys)} clients are ready, and a sum needs {LEAST_MEMBERS}")
        self.roster, self._phase = Roster(self.terms, self._keys), "sealed shares"
        fields = {
            "threshold": self.roster.threshold,
            "bound": float(self.terms.bound),
            "size": self.terms.size,
            "task": self.terms.task,
            "members": {client: keys.to_json() for client, keys in self._keys.items()},
        }
        return dict.fromkeys(self.roster.ids, write_message("roster", self.terms, fields))

    def add_sealed(self, client: str, data: bytes) -> None:
        """Take the shares that a client has sealed for the other members."""
        self._check(client, "sealed shares", self._sealed, self._known_roster.members)
        said = self._read("sealed shares", client, data, {"sealed": read_members(read_sealed)})
        if said["sealed"].keys() != self._known_roster.members.keys() - {client}:
            raise ValueError("it sealed shares for others than the other members")
        self._sealed[client] = said["sealed"]

    def make_deliveries(self) -> dict[str, bytes]:
        """Close the second phase: each gets what the others sealed for it.

        Raises:
            TooFewError: if they are too few.
        """
        self._close("masked update", self._sealed)
        return {
            client: self._write(
                "deliveries",
                {"sealed": {other: sealed[client].hex() for other, sealed in self._sealed.items() if other != client}},
            )
            for client in sorted(self._sealed)
        }

    def add_masked(self, client: str, data: bytes) -> None:
        """Add a client's masked update to the sum. It is not kept."""
        self._check(client, "masked update", self.survivors, self._sealed)
        fields = {"client_id": read_id, "roster": read_digest}
        said, words = read_words(self.terms, data, fields, len(self._total))
        self._check_sender(client, said)
        self._total += words
        self.survivors.append(client)

    def make_survivors(self) -> dict[str, bytes]:
        """Close the third phase: whose masked update is in the sum has survived.

        Raises:
            TooFewError: if they are too few.
        """
        self._close("confirmation", self.survivors)
        self.survivors.sort()
        request = self._write("survivors", {"survivors": self.survivors})
        return dict.fromkeys(self.survivors, request)

    def add_confirmation(self, client: str, data: bytes) -> None:
        """Take a survivor's agreement with the list of survivors."""
        self._check(client, "confirmation", self._signatures, self.survivors)
        fields = {"survivors": read_digest, "signature": read_signature}
        said = self._read("confirmation", client, data, fields)
        self._check_survivors(said["survivors"])
        self._signatures[client] = said["signature"]

    def make_openings(self) -> dict[str, bytes]:
        """Close the fourth phase: ask those who agreed for their shares.

        Raises:
            TooFewError: if they are too few.
        """
        self._close("shares", self._signatures)
        signatures = {client: signature.hex() for client, signature in self._signatures.items()}
        request = self._write("opening", {"survivors": self._survivors_digest, "signatures": signatures})
        return dict.fromkeys(sorted(self._signatures), request)

    def add_shares(self, client: str, data: bytes) -> None:
        """Take a client's shares of the survivors' own masks, and of the keys of those who dropped out."""
        self._check(client, "shares", self._shares, self._signatures)
        fields = {"survivors": read_digest, "shares": read_members(read_share)}
        said = self._read("shares", client, data, fields)
        self._check_survivors(said["survivors"])
        if said["shares"].keys() != self._sealed.keys():
            raise ValueError("it gave shares of others than the members who shared their keys")
        self._shares[client] = said["shares"]

    def open(self) -> OpenedSum:
        """Take the masks off the sum.

        Raises:
            TooFewError: if too few gave their shares.
            ValueError: if shares do not fit, or the sum is out of range.
        """
        roster = self._close("open", self._shares)
        holders = sorted(self._shares)[: roster.threshold]
        alive = set(self.survivors)
        for client in sorted(self._sealed):
            shares = [(roster.indices[holder], self._shares[holder][client]) for holder in holders]
            seed, keys = combine_shares(shares), roster.members[client]
            if client in alive:
                if commit_own_mask(self.terms, client, seed) != keys.commitment:
                    raise ValueError(_name_misfit(client, "own mask"))
                add_mask_(self._total, derive_own_mask(self.terms, client, seed), -1)
                continue
            private_key = derive_mask_key(self.terms, client, seed)
            if make_public_key(private_key) != keys.mask_key:
                raise ValueError(_name_misfit(client, "key"))
            for survivor in self.survivors:
                key = agree(private_key, roster.members[survivor].mask_key, roster.mask_context(survivor, client))
                add_mask_(self._total, key, -find_sign(survivor, client))
        return decode_sum(self._total, self.terms, len(roster.ids), len(self.survivors))

    @property
    def _known_roster(self) -> Roster:
        if self.roster is None:
            raise ValueError("there is no roster yet")
        return self.roster

    @property
    def _survivors_digest(self) -> str:
        return digest(self._known_roster.survivors_context(self.survivors))

    def _check(self, client: str, phase: str, answered: Mapping | list, asked: Mapping | list | None = None) -> None:
        """Refuse an answer out of phase, from one who was not asked, or a second one."""
        if phase != self._phase:
            raise ValueError(f"it sent its {phase} in the phase of the {self._phase}")
        if asked is not None and client not in asked:
            raise ValueError(f"it was not asked for its {phase}")
        if client in answered:
            raise ValueError("it answered twice")

    def _close(self, phase: str, answered: Mapping | list) -> Roster:
        roster = self._known_roster
        if len(answered) < roster.threshold:
            raise TooFewError(
                f"{len(answered)} of {len(roster.ids)} clients sent their {self._phase}, and the sum needs {roster.threshold}"
            )
        self._phase = phase
        return roster

    def _read(self, kind: str, client: str, data: bytes, fields: Mapping) -> dict:
        limit = limit_members(len(self._known_roster.ids))
        said = read_message(kind, self.terms, data, {"client_id": read_id, "roster": read_digest, **fields}, limit)
        self._check_sender(client, said)
        return said

    def _check_sender(self, client: str, said: Mapping) -> None:
        _check_client(client, said)
        if said["roster"] != self._known_roster.digest:
            raise ValueError("it answered to another roster")

    def _check_survivors(self, found: str) -> None:
        if found != self._survivors_digest:
            raise ValueError("it answered to another list of survivors")

    def _write(self, kind: str, fields: Mapping) -> bytes:
        return write_message(kind, self.terms, {"roster": self._known_roster.digest, **fields})


def _check_client(client: str, said: Mapping) -> None:
    if said["client_id"] != client:
        raise ValueError(f"it answered as client {said['client_id']!r:.120}")


def _name_misfit(client: str, what: str) -> str:
    return f"the shares of the {what} of client {client!r:.120} do not fit what it sent at first: a member gave a wrong one"
