# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The messages of a sum, read strictly: their fields, types and lengths are as expected, or they are refused.

From a client come its keys, the shares that it sealed for others, its masked update, its confirmation of the survivors, and
the shares that open the sum. From the server come the roster of the members, the shares sealed for the client, and the
survivors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...wire.encoding import LARGEST, MessageLimit, decode_message, encode_message
from .primitives import KEY_BYTES, SEALED_BYTES, SEED_BYTES
from .terms import MOST_MEMBERS, SumTerms


_ENVELOPE = {"kind", "schema", "quantized"}
_MAX_STRING = 1000  # characters, of a client's id
_MAX_SIGNATURE = 200  # bytes
_MEMBER_BYTES = 16_000  # of a header, for each member: an id of the longest kind, whose every character is escaped
_HEADER_BYTES = 20_000  # of the rest


@dataclass(frozen=True, slots=True)
class MemberKeys:
    """What a member shows everybody.

    Args:
        cipher_key: X25519 public key for the shares that are sealed for it.
        mask_key: X25519 public key of its masks.
        commitment: Digest of the seed of its own mask, so that a wrong share of that seed is found out.
        signature: By its identity's key over the rest; empty where members have none.
    """

    cipher_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes = b""

    def to_json(self) -> list[str]:
        return [self.cipher_key.hex(), self.mask_key.hex(), self.commitment.hex(), self.signature.hex()]

    @classmethod
    def from_json(cls, value: Any) -> "MemberKeys":
        """
        Raises:
            ValueError: if `value` is none of [`to_json`].
        """
        if type(value) is not list or len(value) != 4:
            raise ValueError("a member's keys are no list of four")
        cipher_key, mask_key, commitment = (read_bytes(part, KEY_BYTES) for part in value[:3])
        return cls(cipher_key, mask_key, commitment, read_bytes(value[3], 0, _MAX_SIGNATURE))


def read_bytes(value: Any, least: int, most: int | None = None) -> bytes:
    """Bytes from their hexadecimal form, of exactly `least` or of `least` to `most`.

    Raises:
        ValueError: if they are something else.
    """
    most = least if most is None else most
    if type(value) is not str or not 2 * least <= len(value) <= 2 * most or set(value) - set("0123456789abcdef"):
        raise ValueError(f"expected {least} to {most} bytes in hexadecimal, found {value!r:.40}")
    return bytes.fromhex(value)


def limit_members(members: int) -> MessageLimit:
    """How long a message without a masked update may be."""
    header = _HEADER_BYTES + _MEMBER_BYTES * members
    return MessageLimit(header + 8, header)


def limit_masked(words: int) -> MessageLimit:
    """How long a masked update may be."""
    header = _HEADER_BYTES + _MEMBER_BYTES
    return MessageLimit(header + 8 + 4 * words, header)


def write_message(kind: str, terms: SumTerms, fields: Mapping[str, Any], words: np.ndarray | None = None) -> bytes:
    """A message of a round's sum; `words` `(n,)` uint32 are sent as they are, 4 bytes each."""
    tensors = {} if words is None else {"words": torch.from_numpy(words.astype("<u4", copy=False).view(np.uint8))}
    header = {"federation_id": terms.federation_id, "round": terms.round, **fields}
    return encode_message(f"sum's {kind}", header, tensors)


def read_message(
    kind: str,
    terms: SumTerms,
    data: bytes,
    fields: Mapping[str, Callable[[Any], Any]],
    limit: MessageLimit,
) -> dict[str, Any]:
    """The fields of a message that [`write_message`] wrote, read by `fields`.

    Raises:
        ValueError: if it is damaged, too long, of another round, or a field is missing, unknown or malformed.
    """
    header, payload = decode_message(f"sum's {kind}", data, limit)
    names = {"federation_id", "round"} | fields.keys()
    if header.keys() - _ENVELOPE != names or payload:
        found = ", ".join(sorted(header.keys() - _ENVELOPE))
        raise ValueError(f"The sum's {kind} has the fields {found:.200}; expected {', '.join(sorted(names))} alone.")
    check_round(kind, terms, header)
    return {name: _read_field(kind, name, header[name], read) for name, read in fields.items()}


def read_words(terms: SumTerms, data: bytes, fields: Mapping[str, Callable[[Any], Any]], count: int) -> Any:
    """The fields of a masked update, and its words `(count,)` uint32.

    Raises:
        ValueError: as [`read_message`], and for another number of words.
    """
    header, payload = decode_message("sum's masked update", data, limit_masked(count))
    if header.keys() - _ENVELOPE != {"federation_id", "round"} | fields.keys() or payload.keys() != {"words"}:
        raise ValueError("The sum's masked update has other fields than it should.")
    check_round("masked update", terms, header)
    words = payload["words"]
    if not isinstance(words, torch.Tensor) or words.dtype != torch.uint8 or words.shape != (4 * count,):
        raise ValueError(f"The sum's masked update has other words than {count} of 4 bytes.")
    values = {name: _read_field("masked update", name, header[name], read) for name, read in fields.items()}
    return values, words.numpy().view("<u4")


def check_round(kind: str, terms: SumTerms, header: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: if a message is of another federation or round.
    """
    for name in ("federation_id", "round"):
        found, expected = header.get(name), getattr(terms, name)
        if type(found) is not type(expected) or found != expected:
            raise ValueError(f"The sum's {kind} is of {name} {found!r:.60}; this round's is {expected!r}.")


def read_id(value: Any) -> str:
    """
    Raises:
        ValueError: if `value` is no client's id.
    """
    if type(value) is not str or not 0 < len(value) <= _MAX_STRING or any("\ud800" <= x <= "\udfff" for x in value):
        raise ValueError(f"{value!r:.60} is no client's id")
    return value


def read_number(value: Any) -> int:
    """
    Raises:
        ValueError: if `value` is no whole number from 0.
    """
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{value!r:.40} is no number")
    return value


def read_bound(value: Any) -> float:
    """
    Raises:
        ValueError: if `value` is no float.
    """
    if type(value) is not float:
        raise ValueError(f"{value!r:.40} is no bound")
    return value


def read_digest(value: Any) -> str:
    """
    Raises:
        ValueError: if `value` is no SHA-256.
    """
    return read_bytes(value, 32).hex()


def read_ids(value: Any) -> list[str]:
    """Ids in rising order, none of them twice.

    Raises:
        ValueError: if `value` is something else.
    """
    if type(value) is not list or len(value) > MOST_MEMBERS:
        raise ValueError("expected a list of clients")
    ids = [read_id(entry) for entry in value]
    if ids != sorted(set(ids)):
        raise ValueError("the clients are out of order, or one is there twice")
    return ids


def read_members(read: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    """A reader of mappings from clients to what `read` reads."""

    def read_mapping(value: Any) -> dict[str, Any]:
        if type(value) is not dict or len(value) > MOST_MEMBERS:
            raise ValueError("expected a mapping of clients")
        return {read_id(client): read(entry) for client, entry in value.items()}

    return read_mapping


def read_sealed(value: Any) -> bytes:
    """
    Raises:
        ValueError: if `value` is not the length of two sealed shares.
    """
    return read_bytes(value, SEALED_BYTES)


def read_share(value: Any) -> bytes:
    """
    Raises:
        ValueError: if `value` is not the length of a share.
    """
    return read_bytes(value, SEED_BYTES)


def read_signature(value: Any) -> bytes:
    """
    Raises:
        ValueError: if `value` is too long for a signature.
    """
    return read_bytes(value, 0, _MAX_SIGNATURE)


def _read_field(kind: str, name: str, value: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"The sum's {kind}: `{name}` can't be read ({error}).") from None
