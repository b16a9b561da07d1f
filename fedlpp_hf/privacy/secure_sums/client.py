# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A client's side of one sum, without a transport: bytes in, bytes out, each step once and in order.

Secrets live in this object alone and are never written. After a restart of its process a client can neither unmask what it
sent before, nor tell anybody how.
"""

from collections.abc import Callable, Sequence

from .fixed_point import Contribution, check_contribution, encode_contribution
from .members import (
    Identity,
    Roster,
    commit_own_mask,
    derive_mask_key,
    derive_own_mask,
    digest_ids,
    find_sign,
    keys_context,
)
from .messages import (
    MemberKeys,
    limit_members,
    read_bound,
    read_digest,
    read_ids,
    read_members,
    read_message,
    read_number,
    read_sealed,
    read_signature,
    write_message,
)
from .primitives import (
    SEED_BYTES,
    add_mask_,
    agree,
    digest,
    make_private_key,
    make_public_key,
    make_seed,
    seal,
    split_secret,
    unseal,
)
from .terms import MOST_MEMBERS, SumTerms


STEPS = ("roster", "shares", "survivors", "opening")  # what the server sends, in this order


class RefusedError(ValueError):
    """What a client refuses in a sum, and why. The text holds nothing of its own."""


class SumClient:
    """One client in one round's sum; it is made when the client's local run is over.

    Args:
        terms: Of the round, by the client's own options.
        client_id: Of the client.
        contribution: What it adds.
        identity: With it, every member must have signed its keys, and enough of them the survivors.
        admit: Asked before the masked update leaves, with the digest of all whose updates may be in the sum ([`digest_ids`]);
            raises ValueError if this client has opened the round for others.
        approve: The same before the first share leaves, with the digest of the survivors.

    Raises:
        ValueError: if the contribution could overflow.
    """

    def __init__(
        self,
        terms: SumTerms,
        client_id: str,
        contribution: Contribution,
        identity: Identity | None = None,
        admit: Callable[[str], None] = lambda members: None,
        approve: Callable[[str], None] = lambda survivors: None,
    ):
        check_contribution(contribution, terms)
        self.terms, self.client_id = terms, client_id
        self.identity, self.admit, self.approve = identity, admit, approve
        self._contribution: Contribution | None = contribution
        self._own_seed, self._key_seed, self._cipher_key = make_seed(), make_seed(), make_private_key()
        self._mask_key = derive_mask_key(terms, client_id, self._key_seed)
        self._roster: Roster | None = None
        self._held: dict[str, tuple[bytes, bytes]] = {}  # shares of other members' seeds: of the own mask, of the key
        self._survivors: list[str] = []
        self._answers: list[tuple[bytes, bytes]] = []  # what was asked in each step, and what was answered
        self._has_left = False
        self.keys = self._make_keys()

    def advertise(self) -> bytes:
        """The client's keys; they are the same whenever they are asked for."""
        fields = {"client_id": self.client_id, "keys": self.keys.to_json()}
        return write_message("keys", self.terms, fields)

    def answer(self, step: str, request: bytes) -> bytes:
        """The answer to the server's next request; to the same one again, the same.

        Args:
            step: One of [`STEPS`].
            request: The server's message.

        Raises:
            RefusedError: if the step is out of order, was taken with another request, or the request breaks a rule.
        """
        if step not in STEPS:
            raise RefusedError(f"a sum has no step {step!r:.40}")
        place, done = STEPS.index(step), len(self._answers)
        if place < done:
            if self._answers[place][0] != request:
                raise RefusedError(f"this client has answered another request for the {step} in this round")
            return self._answers[place][1]
        if self._has_left:
            raise RefusedError("this client has refused a request in this round, and takes no further part in it")
        if place > done:
            raise RefusedError(f"the server asks for the {step} before the {STEPS[done]}")
        take = {
            "roster": self._share,
            "shares": self._mask,
            "survivors": self._confirm,
            "opening": self._open,
        }[step]
        self._has_left = True  # unless all of it goes well: half a step must not be followed by another try
        try:
            answer = take(request)
        except RefusedError:
            raise
        except ValueError as error:
            raise RefusedError(str(error)) from error
        self._has_left = False
        self._answers.append((request, answer))
        return answer

    def _make_keys(self) -> MemberKeys:
        terms, client = self.terms, self.client_id
        keys = MemberKeys(
            make_public_key(self._cipher_key),
            make_public_key(self._mask_key),
            commit_own_mask(terms, client, self._own_seed),
        )
        if self.identity is None:
            return keys
        signature = self.identity.sign(keys_context(terms, client, keys))
        return MemberKeys(keys.cipher_key, keys.mask_key, keys.commitment, signature)

    def _share(self, request: bytes) -> bytes:
        """Check the roster, and seal for each other member its shares of this client's two seeds."""
        roster = self._read_roster(request)
        count, threshold = len(roster.ids), roster.threshold
        shares = [split_secret(seed, threshold, count) for seed in (self._own_seed, self._key_seed)]
        sealed = {}
        for client, own, key in zip(roster.ids, *shares, strict=True):
            if client == self.client_id:
                self._held[client] = own, key
            else:
                context = roster.seal_context(self.client_id, client)
                secret = agree(self._cipher_key, roster.members[client].cipher_key, context)
                sealed[client] = seal(secret, own + key, context).hex()
        self._roster = roster
        return self._write("sealed shares", {"sealed": sealed})

    def _read_roster(self, request: bytes) -> Roster:
        terms = self.terms
        fields = {
            "threshold": read_number,
            "bound": read_bound,
            "size": read_number,
            "task": read_digest,
            "members": read_members(MemberKeys.from_json),
        }
        said = read_message("roster", terms, request, fields, limit_members(MOST_MEMBERS))
        roster = Roster(terms, said["members"])
        if len(roster.ids) < terms.least:
            raise RefusedError(f"{len(roster.ids)} clients are in the sum; this client's policy demands {terms.least}")
        for name, own in (("threshold", roster.threshold), ("bound", terms.bound), ("size", terms.size)):
            if said[name] != own:
                raise RefusedError(f"the server's {name} is {said[name]}; by this client's options it is {own}")
        if said["task"] != terms.task:
            raise RefusedError("the server gave others another task than this client: another proxy, or other options")
        if roster.members.get(self.client_id) != self.keys:
            raise RefusedError("the server's roster has other keys of this client than it sent, or none")
        if self.identity is not None:
            for client, keys in roster.members.items():
                if not self.identity.verify(client, keys.signature, keys_context(terms, client, keys)):
                    raise RefusedError(f"the keys of client {client!r:.120} are not signed by it")
        return roster

    def _mask(self, request: bytes) -> bytes:
        """Open the shares that others sealed for this client, and mask its update against each of them."""
        roster = self._known_roster
        fields = {"roster": read_digest, "sealed": read_members(read_sealed)}
        said = read_message("deliveries", self.terms, request, fields, limit_members(len(roster.ids)))
        self._check_roster(said["roster"])
        senders = said["sealed"]
        if self.client_id in senders or not senders.keys() <= roster.members.keys():
            raise RefusedError("the server delivers shares of clients that are not members, or of this client itself")
        if len(senders) + 1 < roster.threshold:
            raise RefusedError(
                f"{len(senders) + 1} clients have shared their keys; at least {roster.threshold} must have"
            )
        self.admit(digest_ids([*senders, self.client_id]))
        for client, sealed in senders.items():
            context = roster.seal_context(client, self.client_id)
            secret = agree(self._cipher_key, roster.members[client].cipher_key, context)
            shares = unseal(secret, sealed, context)
            self._held[client] = shares[:SEED_BYTES], shares[SEED_BYTES:]
        assert self._contribution is not None
        words = encode_contribution(self._contribution, self.terms, len(roster.ids))
        self._contribution = None  # from here on it exists masked alone
        add_mask_(words, derive_own_mask(self.terms, self.client_id, self._own_seed), 1)
        for client in senders:
            context = roster.mask_context(self.client_id, client)
            key = agree(self._mask_key, roster.members[client].mask_key, context)
            add_mask_(words, key, find_sign(self.client_id, client))
        fields_out = {"client_id": self.client_id, "roster": roster.digest}
        return write_message("masked update", self.terms, fields_out, words)

    def _confirm(self, request: bytes) -> bytes:
        """Settle, once, who survived; signed where members have identities."""
        roster = self._known_roster
        fields = {"roster": read_digest, "survivors": read_ids}
        said = read_message("survivors", self.terms, request, fields, limit_members(len(roster.ids)))
        self._check_roster(said["roster"])
        survivors: Sequence[str] = said["survivors"]
        if not set(survivors) <= self._held.keys():
            raise RefusedError("the server names survivors that did not share their keys")
        if self.client_id not in survivors:
            raise RefusedError("the server says that this client dropped out, but it has sent its masked update")
        if len(survivors) < roster.threshold:
            raise RefusedError(f"{len(survivors)} clients survived; at least {roster.threshold} must have")
        self._survivors = list(survivors)
        context = roster.survivors_context(survivors)
        signature = b"" if self.identity is None else self.identity.sign(context)
        return self._write("confirmation", {"survivors": digest(context), "signature": signature.hex()})

    def _open(self, request: bytes) -> bytes:
        """Give the shares that open the sum: of a survivor's own mask, or of the key of one that dropped out; never both."""
        roster = self._known_roster
        fields = {"roster": read_digest, "survivors": read_digest, "signatures": read_members(read_signature)}
        said = read_message("opening", self.terms, request, fields, limit_members(len(roster.ids)))
        self._check_roster(said["roster"])
        context = roster.survivors_context(self._survivors)
        if said["survivors"] != digest(context):
            raise RefusedError("the server asks to open the sum of other survivors than this client confirmed")
        if self.identity is not None:
            signers = said["signatures"]
            if not signers.keys() <= set(self._survivors) or len(signers) < roster.threshold:
                raise RefusedError(
                    f"{len(signers)} survivors confirmed the list; at least {roster.threshold} must have"
                )
            for client, signature in signers.items():
                if not self.identity.verify(client, signature, context):
                    raise RefusedError(f"client {client!r:.120} did not confirm these survivors")
        self.approve(digest_ids(self._survivors))
        alive = set(self._survivors)
        shares = {client: held[0 if client in alive else 1].hex() for client, held in self._held.items()}
        self._held.clear()
        return self._write("shares", {"shares": shares, "survivors": digest(context)})

    @property
    def _known_roster(self) -> Roster:
        assert self._roster is not None  # `answer` keeps the order
        return self._roster

    def _check_roster(self, found: str) -> None:
        if found != self._known_roster.digest:
            raise RefusedError("the server has another roster than it showed this client")

    def _write(self, kind: str, fields: dict) -> bytes:
        assert self._roster is not None
        own = {"client_id": self.client_id, "roster": self._roster.digest}
        return write_message(kind, self.terms, own | fields)
