# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A round's members as one value: who they are, with what keys, and the purposes of all keys that two of them share."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from .messages import MemberKeys
from .primitives import derive_key, digest, make_context
from .terms import LEAST_MEMBERS, MOST_MEMBERS, SumTerms


@dataclass(frozen=True, slots=True)
class Identity:
    """A client's own signing key, and those of the others, as it knows them from elsewhere than the server.

    Args:
        sign: Signs bytes.
        verify: Whether a signature over bytes is that of a client.
    """

    sign: Callable[[bytes], bytes]
    verify: Callable[[str, bytes, bytes], bool]


@dataclass(frozen=True)
class Roster:
    """The members of a round's sum.

    All keys are bound to its digest. A server that shows different rosters to two members leaves them with different keys:
    what one seals, the other can't open.

    Args:
        terms: Of the round.
        members: Keys by client.

    Raises:
        ValueError: if there are too few or too many, or two members have a key in common.
    """

    terms: SumTerms
    members: Mapping[str, MemberKeys]

    def __post_init__(self) -> None:
        count = len(self.members)
        if not LEAST_MEMBERS <= count <= MOST_MEMBERS:
            raise ValueError(f"a sum of {count} clients; expected {LEAST_MEMBERS} to {MOST_MEMBERS}")
        for name in ("cipher_key", "mask_key", "commitment"):
            if len({getattr(member, name) for member in self.members.values()}) < count:
                raise ValueError("two clients have a key in common")

    @cached_property
    def ids(self) -> list[str]:
        return sorted(self.members)

    @cached_property
    def threshold(self) -> int:
        return self.terms.threshold(len(self.members))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that members must agree on."""
        parts: list[str | int] = [self.threshold, repr(self.terms.bound), self.terms.size, self.terms.task]
        for client in self.ids:
            parts += [client, *self.members[client].to_json()]
        return digest(make_round_context(self.terms, "roster", *parts))

    @cached_property
    def indices(self) -> dict[str, int]:
        """The indices of the members' shares, from 1."""
        return {client: place for place, client in enumerate(self.ids, 1)}

    def mask_context(self, one: str, other: str) -> bytes:
        """The purpose of the mask of a pair, the same for both."""
        return make_round_context(self.terms, "pair mask", self.digest, *sorted((one, other)))

    def seal_context(self, sender: str, recipient: str) -> bytes:
        """The purpose of what one member seals for another."""
        return make_round_context(self.terms, "sealed shares", self.digest, sender, recipient)

    def survivors_context(self, survivors: Iterable[str]) -> bytes:
        """What members sign who agree that these survived."""
        return make_round_context(self.terms, "survivors", self.digest, *survivors)


def make_round_context(terms: SumTerms, label: str, *parts: str | int) -> bytes:
    """[`make_context`] of a round of a federation."""
    return make_context(label, terms.federation_id, terms.round, *parts)


def digest_ids(ids: Iterable[str]) -> str:
    """SHA-256 of a set of clients."""
    return digest(make_context("clients", *sorted(ids)))


def derive_mask_key(terms: SumTerms, client: str, seed: bytes) -> bytes:
    """The X25519 private key of a member's pair masks, from the seed that it shares."""
    return derive_key(seed, make_round_context(terms, "mask key", client))


def derive_own_mask(terms: SumTerms, client: str, seed: bytes) -> bytes:
    """The key of a member's own mask, from the seed that it shares."""
    return derive_key(seed, make_round_context(terms, "own mask", client))


def commit_own_mask(terms: SumTerms, client: str, seed: bytes) -> bytes:
    """What a member publishes of the seed of its own mask."""
    return derive_key(seed, make_round_context(terms, "own mask's commitment", client))


def keys_context(terms: SumTerms, client: str, keys: MemberKeys) -> bytes:
    """What a member signs of its keys."""
    return make_round_context(terms, "keys", client, *keys.to_json()[:3])


def find_sign(one: str, other: str) -> int:
    """The sign with which `one` adds the mask that it has in common with `other`: theirs cancel in the sum."""
    return 1 if one < other else -1
