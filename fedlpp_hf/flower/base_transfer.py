# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Send the quantized base from the server to clients: in pieces, resumed after an interruption, stored by fingerprint.

The ClientApp, a new process for every message, imports this module, so nothing at its top may import torch.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any


_MANIFEST = "base_manifest.json"  # as in `fedlpp_hf.base.manifest`, whose import loads torch


@dataclass(frozen=True, slots=True)
class PackedBase:
    """The server's side: a base packed into one file, read in pieces.

    Args:
        file: the packed file.
        fingerprint: of the base, whoever's copy it is.
        copy: identifies a marked copy; empty where all clients have the same base.
        size: of the file, in bytes.
    """

    file: Path
    fingerprint: str
    copy: str
    size: int

    @classmethod
    def pack(cls, base_dir: str | os.PathLike, file: str | os.PathLike, marked: bool = False) -> "PackedBase":
        """Pack the base in `base_dir` into `file`.

        Raises:
            ValueError: if it differs from its manifest.
        """
        from ..base.packing import pack_base

        manifest = _read_manifest(base_dir)
        size = pack_base(base_dir, file)
        return cls(Path(file), str(manifest["fingerprint"]), str(manifest["copy"]) if marked else "", size)

    @classmethod
    def open(cls, file: str | os.PathLike) -> "PackedBase":
        """A marked copy that [`pack`] packed earlier.

        Raises:
            ValueError: if the file is damaged.
        """
        from ..base.packing import read_packed_manifest

        manifest = read_packed_manifest(file)
        return cls(Path(file), manifest["fingerprint"], manifest["copy"], os.stat(file).st_size)

    def read(self, offset: int, count: int) -> dict[str, Any]:
        """At most `count` bytes from `offset`, as the arguments of [`receive_piece`]."""
        with self.file.open("rb") as file:
            file.seek(offset)
            data = file.read(count)
        digest = hashlib.sha256(data).hexdigest()
        return {"offset": offset, "size": self.size, "sha256": digest, "data": data}


def find_base(
    cache_dir: str | os.PathLike, fingerprint: str, base: str | None = None, copy: str | None = None
) -> Path | None:
    """The directory of the base on this machine, or None if the cache does not have it.

    Args:
        cache_dir: where [`receive_piece`] stores bases.
        fingerprint: that of the federation's base.
        base: this client's own copy instead: a directory, or a Hub id, downloaded with this user's token.
        copy: identifies the copy that was marked for this client, where copies are marked.

    Raises:
        ValueError: if `base` is a different base, or another client's copy.
    """
    if base is None:
        path = _cached(cache_dir, copy or fingerprint)
        if not (path / _MANIFEST).is_file():
            return None
        path.with_suffix(".partial").unlink(
            missing_ok=True
        )  # of a client that was killed after it had unpacked the base
        return path
    path = Path(base)
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(base))
    found = _read_manifest(path)
    if found["fingerprint"] != fingerprint:
        raise ValueError(
            f"base='{base}' is the base {str(found['fingerprint'])[:12]}…; the federation's is {fingerprint[:12]}…."
        )
    if copy is not None and found.get("copy") != copy:
        raise ValueError(f"base='{base}' is not the copy that the owner marked for this client; leave --base out.")
    return path


def read_fingerprint(base_dir: str | os.PathLike) -> str:
    """The fingerprint in a base's manifest. It is not checked here, but when the base is loaded.

    Raises:
        ValueError: if there is no manifest with a fingerprint.
    """
    return str(_read_manifest(base_dir)["fingerprint"])


def _read_manifest(base_dir: str | os.PathLike) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((Path(base_dir) / _MANIFEST).read_text(encoding="utf-8"))
        manifest["fingerprint"]
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{base_dir}` is not a quantized base: its `{_MANIFEST}` can't be read ({error!r})."
        ) from error


def count_received(cache_dir: str | os.PathLike, fingerprint: str, copy: str | None = None) -> int:
    """Bytes of the packed base, or of this client's copy of it, received so far."""
    partial = _cached(cache_dir, copy or fingerprint).with_suffix(".partial")
    return partial.stat().st_size if partial.exists() else 0


def receive_piece(
    cache_dir: str | os.PathLike,
    fingerprint: str,
    *,
    offset: int,
    size: int,
    sha256: str,
    data: bytes,
    copy: str | None = None,
) -> int:
    """Append a piece of the packed base, and unpack the base after the last one.

    Returns the bytes received so far, which tell the sender where to continue: a piece for another place is ignored.

    Args:
        cache_dir: directory for bases.
        fingerprint: that of the federation's base.
        offset: of the piece in the packed base, in bytes.
        size: of the packed base, in bytes.
        sha256: hexadecimal digest of the piece.
        data: the piece.
        copy: identifies this client's copy, where copies are marked.

    Raises:
        ValueError: if the piece, or in the end the base, is damaged; the damaged data are deleted.
    """
    base_dir = _cached(cache_dir, copy or fingerprint)
    partial = base_dir.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    have = count_received(cache_dir, fingerprint, copy)
    if offset != have:
        return have
    if hashlib.sha256(data).hexdigest() != sha256 or have + len(data) > size:
        raise ValueError(f"A piece of the base at {offset} of {size} bytes is damaged.")
    with partial.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if have + len(data) < size:
        return have + len(data)
    from ..base.packing import unpack_base

    try:
        manifest = unpack_base(partial, base_dir, overwrite=True)
        if manifest["fingerprint"] != fingerprint or copy not in (None, manifest["copy"]):
            shutil.rmtree(base_dir)
        if manifest["fingerprint"] != fingerprint:
            raise ValueError(
                f"The server sent the base {manifest['fingerprint'][:12]}… instead of {fingerprint[:12]}…."
            )
        if copy is not None and manifest["copy"] != copy:
            raise ValueError("The server sent another copy of the base than it had announced.")
    finally:
        partial.unlink()
    return size


def _cached(cache_dir: str | os.PathLike, fingerprint: str) -> Path:
    # It comes from a server and becomes the name of a directory.
    if not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        raise ValueError(f"{fingerprint!r} is not a fingerprint of a base.")
    return Path(cache_dir) / fingerprint
