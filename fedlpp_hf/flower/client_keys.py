# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which client ids each node's key may announce: what the files in the directory of --client_keys are called.

`clinic-a.pub` registers the key in it for the id `clinic-a`. One key for several ids is several files with the same key. The
owner names the files, so nothing that a client writes into its own file says whose key it is.
"""

import logging
import os
import unicodedata
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key


logger = logging.getLogger(__name__)

_MAX_BYTES = 10_000  # of a file


class ClientKeys:
    """The keys in a directory, read again whenever a file is added, changed or removed.

    Args:
        directory: of the `*.pub` files.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self._stamp: list[tuple[str, int, int]] | None = None
        self._ids: dict[bytes, tuple[str, ...]] = {}
        self._warned: set[tuple[str, int, int]] = set()

    def find_ids(self, public_key: bytes) -> tuple[str, ...]:
        """The ids that a node with this key (PEM, as Flower keeps it) may announce, sorted; none if it is not registered."""
        self._refresh()
        return self._ids.get(public_key, ())

    def list_holders(self) -> list[tuple[str, ...]]:
        """The ids of each key."""
        self._refresh()
        return sorted(self._ids.values())

    def _refresh(self) -> None:
        stamp = sorted((path.name, *_stat(path)) for path in self.directory.glob("*.pub"))
        if stamp == self._stamp:
            return
        found: dict[bytes, list[str]] = {}
        for entry in stamp:
            path = self.directory / entry[0]
            try:
                # The file's name may be decomposed (macOS); a client's id is what its user typed.
                found.setdefault(read_public_key(path), []).append(unicodedata.normalize("NFC", path.stem))
            except ValueError as error:
                if (
                    entry not in self._warned
                ):  # the owner may be writing the file; whatever it holds, it registers nobody
                    logger.warning("%s It registers no client.", error)
                self._warned.add(entry)
        self._stamp, self._ids = stamp, {key: tuple(sorted(ids)) for key, ids in found.items()}


def read_public_key(path: str | os.PathLike) -> bytes:
    """The key in a `.pub` file, in the form (PEM) in which Flower keeps and compares it.

    Raises:
        ValueError: if it is none that a node can have.
    """
    expected = "expected the node.pub that the client sent"
    try:
        if os.stat(path).st_size > _MAX_BYTES:
            raise ValueError("it is too long")
        key = load_ssh_public_key(Path(path).read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm, NotImplementedError) as error:  # the last: a compressed point
        raise ValueError(f"`{path}` can't be read as a public key ({error}); {expected}.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError(f"`{path}` is a key of another kind than nodes have; {expected}.")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def name_holder(ids: tuple[str, ...]) -> str:
    """The name of whoever has a key, in marks and in logs: its ids, joined."""
    return " + ".join(ids)


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return 0, 0  # removed meanwhile
    return stat.st_mtime_ns, stat.st_size
