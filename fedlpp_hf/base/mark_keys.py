# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The owner's key file, which makes and traces marked copies of a base. It needs no torch."""

import json
import os
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..privacy.marks import Mark
from ..tensors.atomic import write_atomically


_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class MarkKey:
    """What the owner needs to make marked copies and to trace them. Whoever reads it can remove the marks.

    Args:
        secret: In hexadecimal.
        full_model: The full model that the copies are made of.
        settings: Arguments of [`export_base`] that decide which weights are marked.
        clients: Ids of the clients that have a copy.
    """

    secret: str
    full_model: str
    settings: dict[str, Any]
    clients: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: str | os.PathLike) -> "MarkKey":
        """Read a key file.

        Raises:
            ValueError: if it is missing, damaged, or readable by other users.
        """
        path = Path(file)
        try:
            mode = path.stat().st_mode
            key = cls(**json.loads(path.read_text(encoding="utf-8")))
            if len(bytes.fromhex(key.secret)) != _SECRET_BYTES:
                raise ValueError("its secret has the wrong length")
            names = [key.full_model, *key.clients]
            if (
                not isinstance(key.clients, list)
                or not isinstance(key.settings, dict)
                or not all(isinstance(name, str) for name in names)
            ):
                raise ValueError("it holds other things than names and settings")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"The key `{file}` can't be read ({error}). `fedlpp-hf quantize --mark CLIENT --key FILE` makes one."
            ) from error
        if mode & 0o077:
            raise ValueError(
                f"Other users can read the key `{file}`; whoever has it can remove the marks. chmod 600 it."
            )
        return key

    def write(self, file: str | os.PathLike) -> None:
        """Write the key file, for its user alone."""
        before = os.umask(0o177)
        try:
            write_atomically(Path(file), (json.dumps(asdict(self), indent=2) + "\n").encode())
        finally:
            os.umask(before)

    def mark_for(self, client: str) -> Mark:
        """The mark of a client's copy."""
        return Mark(bytes.fromhex(self.secret), client)


def prepare_mark(
    file: str | os.PathLike, client: str, full_model: str | os.PathLike, settings: dict[str, Any]
) -> Mark:
    """The mark for `client`, whose id the key file gets; a new key file is made where there is none.

    Args:
        file: The key file.
        client: The client's id.
        full_model: The full model.
        settings: Arguments of [`export_base`] that decide which weights are marked.

    Raises:
        ValueError: if the key belongs to another full model, or to copies with other settings.
    """
    path, model = Path(file), _name_of(full_model)
    if not client:
        raise ValueError("The client's id is empty; a mark needs a name to trace it back to.")
    if path.exists():
        key = MarkKey.read(path)
        if (key.full_model, key.settings) != (model, settings):
            raise ValueError(
                f"The key `{file}` is for copies of `{key.full_model}` with {key.settings}; given were `{model}` and "
                f"{settings}. Copies can be traced together only if they differ in their marks alone: use the same "
                "settings, or another key file."
            )
    else:
        key = MarkKey(secrets.token_hex(_SECRET_BYTES), model, settings)
    if client not in key.clients:
        # Before the copy is made: one that nobody could trace must not exist.
        key = replace(key, clients=[*key.clients, client])
        key.write(path)
    return key.mark_for(client)


def _name_of(full_model: str | os.PathLike) -> str:
    return str(Path(full_model).resolve()) if Path(full_model).is_dir() else str(full_model)
