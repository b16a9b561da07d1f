# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The primitives that the protocol combines: X25519, HKDF-SHA256, ChaCha20, ChaCha20-Poly1305, Shamir's shares.

All come from `cryptography` and `pycryptodome`, which are imported where they are used: the library works without them.
"""

import hashlib
import secrets
from collections.abc import Sequence

import numpy as np


SEED_BYTES = 16  # what Shamir's shares in GF(2^128) hold
KEY_BYTES = 32
_NONCE_BYTES = 12
SEALED_BYTES = _NONCE_BYTES + 2 * SEED_BYTES + 16  # a nonce, two shares and a tag
_CHUNK = 1 << 18  # words of a mask that are made at a time: with 1 MiB, all arithmetic is in the second cache
_LABEL = b"fedlpp_hf secure sums 1"


def make_context(label: str, *parts: str | int | bytes) -> bytes:
    """The bytes that say what a key, a signature or a digest is for: no two lists of parts have the same."""
    encoded = [_LABEL, label.encode()]
    encoded += [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)


def digest(context: bytes) -> str:
    """SHA-256 of a context, in hexadecimal."""
    return hashlib.sha256(context).hexdigest()


def make_private_key() -> bytes:
    """An X25519 private key from the operating system's randomness."""
    return secrets.token_bytes(KEY_BYTES)


def make_seed() -> bytes:
    """A secret of 128 bits from the operating system."""
    return secrets.token_bytes(SEED_BYTES)


def derive_key(secret: bytes, context: bytes) -> bytes:
    """A key of 32 bytes by HKDF-SHA256 (RFC 5869)."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), KEY_BYTES, None, context).derive(secret)


def make_public_key(private_key: bytes) -> bytes:
    """The public key of an X25519 private key (RFC 7748)."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def agree(private_key: bytes, public_key: bytes, context: bytes) -> bytes:
    """The key of two parties for one purpose: X25519, then HKDF.

    Raises:
        ValueError: for a public key of small order, with which everybody would know the result.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        secret = X25519PrivateKey.from_private_bytes(private_key).exchange(
            X25519PublicKey.from_public_bytes(public_key)
        )
    except ValueError as error:
        raise ValueError("a public key is none that keys can be agreed with") from error
    return derive_key(secret, context)


def add_mask_(total: np.ndarray, key: bytes, sign: int) -> None:
    """Add ChaCha20's stream (RFC 8439) of a key that is used once to `total` `(n,)` uint32, modulo 2^32, or subtract it.

    Args:
        total: What is masked, or unmasked.
        key: 32 bytes.
        sign: 1 or -1.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    zeros = bytes(4 * min(_CHUNK, len(total)))
    buffer = np.empty(len(zeros), np.uint8)
    apply = np.add if sign > 0 else np.subtract
    for start in range(0, len(total), _CHUNK):
        piece = total[start : start + _CHUNK]
        stream.update_into(zeros[: 4 * len(piece)], buffer[: 4 * len(piece)].data)
        apply(piece, buffer[: 4 * len(piece)].view("<u4"), out=piece)


def seal(key: bytes, text: bytes, context: bytes) -> bytes:
    """Encrypt and authenticate `text` and its context (ChaCha20-Poly1305, RFC 8439)."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """The inverse of [`seal`].

    Raises:
        ValueError: if it was sealed with another key or context, or changed.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
    except InvalidTag as error:
        raise ValueError("a share can't be decrypted: it was changed, or made for another round or list") from error


def split_secret(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shamir's shares of 16 bytes; share i has the index i + 1, and `threshold` of them give the secret back."""
    from Crypto.Protocol.SecretSharing import Shamir

    return [share for _, share in sorted(Shamir.split(threshold, count, secret, False))]


def combine_shares(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret of exactly as many shares, with their indices, as its threshold."""
    from Crypto.Protocol.SecretSharing import Shamir

    return Shamir.combine(list(shares), False)
