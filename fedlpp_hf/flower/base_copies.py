# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The packed bases that a server sends: one for all nodes, or a marked copy for each.

Each node gets its whole copy. A common base with a patch for each client would show a client which of its weights are marked.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from .base_transfer import PackedBase


logger = logging.getLogger(__name__)


class Bases(Protocol):
    """Where a server finds the base for a node."""

    def find(self, holder: str) -> PackedBase:
        """The packed base for the node of `holder`."""


class CommonBase:
    """One base for all.

    Args:
        base_dir: directory of the base.
        file: path of the packed file, which is written.
    """

    def __init__(self, base_dir: str | os.PathLike, file: str | os.PathLike):
        self._base = PackedBase.pack(base_dir, file)

    def find(self, holder: str) -> PackedBase:
        """The one base."""
        return self._base


class MarkedCopies:
    """A copy of the base for each holder of a key, which tells whose it is; made when it is needed first.

    On disk is one packed file for each holder, and one unpacked base while a copy is made. A resumed federation finds the
    files again.

    Args:
        directory: for the files.
        owner: the handle on the owner's process, which makes the copies.
        key_file: the owner's secret, made where there is none.
        fingerprint: of the federation's base, which all copies share.
    """

    def __init__(self, directory: str | os.PathLike, owner: Any, key_file: str | os.PathLike, fingerprint: str):
        self.directory, self.owner = Path(directory), owner
        self.key_file, self.fingerprint = Path(key_file).resolve(), fingerprint
        self._copies: dict[str, PackedBase] = {}

    def find(self, holder: str) -> PackedBase:
        """The copy of a holder.

        Raises:
            ValueError: if the owner's key does not fit the federation's base.
        """
        if holder not in self._copies:
            file = self._locate(holder)
            copy = PackedBase.open(file) if file is not None and file.is_file() else self._make(holder)
            if copy.fingerprint != self.fingerprint:
                raise ValueError(
                    f"The marked copy in `{copy.file}` is of the base {copy.fingerprint[:12]}…; the federation's is "
                    f"{self.fingerprint[:12]}…. Delete that file."
                )
            self._copies[holder] = copy
        return self._copies[holder]

    def forget_others(self, holders: Iterable[str]) -> None:
        """Delete the copies of whoever is not among `holders`."""
        kept = {self._locate(holder) for holder in holders}
        for file in self.directory.glob("*.packed"):
            if file not in kept:
                file.unlink()

    def _locate(self, holder: str) -> Path | None:
        """The file of a holder's copy; None before there is a key."""
        from ..base.mark_keys import MarkKey

        if not self.key_file.exists():
            return None
        # By digest: what a client is called must never become a path. Another secret makes other copies.
        text = f"{MarkKey.read(self.key_file).secret} {self.fingerprint} {holder}"
        return self.directory / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.packed"

    def _make(self, holder: str) -> PackedBase:
        self.directory.mkdir(parents=True, exist_ok=True)
        unpacked = self.directory / "export"
        shutil.rmtree(unpacked, ignore_errors=True)  # left by a run that was killed
        logger.info("Marking the copy of the base for %s.", holder)
        try:
            self.owner.export_base(unpacked, mark=(str(self.key_file), holder))
            file = self._locate(holder)
            assert file is not None  # the export makes the key
            return PackedBase.pack(unpacked, file, marked=True)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
