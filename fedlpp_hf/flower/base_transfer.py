# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The quantized base on its way from the server to clients: in pieces, resumed where it broke off, kept by fingerprint.

Nothing heavy is imported at the top, and it is no part of the package `base`, whose import loads transformers: the
ClientApp, a new process in every message, imports this module.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any


_MANIFEST = "base_manifest.json"


class PackedBase:
    """The server's side of sending a base: one packed file, read in pieces."""

    def __init__(self, base_dir: str | os.PathLike, file: str | os.PathLike):
        self.file = Path(file)
        from ..base.packing import pack_base

        self.fingerprint = read_fingerprint(base_dir)
        self.size = pack_base(base_dir, self.file)

    def read(self, offset: int, count: int) -> dict[str, Any]:
        """At most `count` bytes from `offset`, with what their receiver has to know."""
        with self.file.open("rb") as file:
            file.seek(offset)
            data = file.read(count)
        digest = hashlib.sha256(data).hexdigest()
        return {"offset": offset, "size": self.size, "sha256": digest, "data": data}


def find_base(cache_dir: str | os.PathLike, fingerprint: str, base: str | None = None) -> Path | None:
    """Where this machine has the base: in the cache, or in `base`, a directory or a Hub id (with this user's token).

    Raises:
        ValueError: if `base` is another one.
    """
    if base is None:
        path = _cached(cache_dir, fingerprint)
        return path if (path / _MANIFEST).is_file() else None
    path = Path(base)
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(base))
    held = read_fingerprint(path)
    if held != fingerprint:
        raise ValueError(f"base='{base}' is the base {held[:12]}…; the federation's is {fingerprint[:12]}….")
    return path


def read_fingerprint(base_dir: str | os.PathLike) -> str:
    """The fingerprint in a base's manifest, unchecked: whoever loads the base proves it.

    Raises:
        ValueError: if there is no manifest, or none with a fingerprint.
    """
    try:
        return str(json.loads((Path(base_dir) / _MANIFEST).read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{base_dir}` is no quantized base: its `{_MANIFEST}` can't be read ({error!r}).") from error


def count_received(cache_dir: str | os.PathLike, fingerprint: str) -> int:
    """Bytes of the packed base that have arrived so far."""
    partial = _cached(cache_dir, fingerprint).with_suffix(".partial")
    return partial.stat().st_size if partial.exists() else 0


def receive_piece(
    cache_dir: str | os.PathLike, fingerprint: str, *, offset: int, size: int, sha256: str, data: bytes
) -> int:
    """Append a piece of the packed base, unpack it after the last one, and return the bytes that are there.

    A piece that does not continue what is there is ignored: the returned number tells the sender where to go on.

    Raises:
        ValueError: if the piece, or the base in the end, is damaged; what is damaged is not kept.
    """
    base_dir = _cached(cache_dir, fingerprint)
    partial = base_dir.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    have = count_received(cache_dir, fingerprint)
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
        if manifest["fingerprint"] != fingerprint:
            raise ValueError(
                f"The server sent the base {manifest['fingerprint'][:12]}… instead of {fingerprint[:12]}…."
            )
    finally:
        partial.unlink()
    return size


def _cached(cache_dir: str | os.PathLike, fingerprint: str) -> Path:
    # It names a directory here and comes from a server.
    if not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        raise ValueError(f"{fingerprint!r} is no fingerprint of a base.")
    return Path(cache_dir) / fingerprint
