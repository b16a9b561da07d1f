# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The other clients' keys, as a client knows them from elsewhere than the server: with them no server can invent a client."""

import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from .certificates import NODE_KEY
from .client_keys import read_public_key
from .client_settings import ClientSettings


if TYPE_CHECKING:
    from ..privacy.secure_sums.members import Identity


def read_peers(directory: str | os.PathLike) -> dict[str, bytes]:
    """The public keys (PEM) in a directory by client id: `clinic-a.pub` is the key of the client `clinic-a`.

    Raises:
        ValueError: if there are none, or one can't be read.
    """
    keys = {unicodedata.normalize("NFC", path.stem): read_public_key(path) for path in Path(directory).glob("*.pub")}
    if not keys:
        raise ValueError(
            f"--peer_keys `{directory}` has no `*.pub`; expected the node.pub of every client, by its id."
        )
    return keys


def read_identity(settings: ClientSettings) -> "Identity | None":
    """This client's node key, to sign with, and the keys in `settings.peer_keys`, to verify with; None without these.

    Signatures are ECDSA over P-384 with SHA-384, as the node's key is one for it.

    Raises:
        ValueError: if this client's own key is not among them.
    """
    if settings.peer_keys is None:
        return None
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.hashes import SHA384
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_public_key,
        load_ssh_private_key,
    )

    from ..privacy.secure_sums.members import Identity

    peers = read_peers(settings.peer_keys)
    own = load_ssh_private_key((Path(settings.state_dir) / NODE_KEY).read_bytes(), None)
    assert isinstance(own, EllipticCurvePrivateKey)  # `make_node_key` makes no other
    public = own.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if peers.get(settings.client_id) != public:
        raise ValueError(
            f"--peer_keys `{settings.peer_keys}` has no `{settings.client_id}.pub` with this client's own key. Put its node.pub "
            "there, and give all clients the same files."
        )
    keys = {client: load_pem_public_key(key) for client, key in peers.items()}

    def sign(data: bytes) -> bytes:
        return own.sign(data, ECDSA(SHA384()))

    def verify(client: str, signature: bytes, data: bytes) -> bool:
        key = keys.get(client)
        try:
            if isinstance(key, EllipticCurvePublicKey):
                key.verify(signature, data, ECDSA(SHA384()))
                return True
        except InvalidSignature:
            pass
        return False

    return Identity(sign, verify)
