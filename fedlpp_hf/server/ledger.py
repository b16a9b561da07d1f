# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a federation has spent of its privacy budget, on disk: written before noise is drawn, so that no crash forgets it."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..tensors.atomic import write_atomically


LEDGER_FILE = "privacy.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Ledger:
    """A federation's noise.

    Args:
        federation_id: Of the federation.
        noise_multiplier: Of all its rounds; a longer `num_rounds` does not make it another one.
        secret: From which the clients of a round are drawn, in hexadecimal. Whoever has it and the model knows who was in
            which round, and for them ε is larger.
        releases: The round of each noise that was drawn, in order. A round that was lost after its noise is there twice.
    """

    federation_id: str
    noise_multiplier: float
    secret: str
    releases: Sequence[int] = ()


class LedgerFile:
    """The ledger under `_federation/`, which only its owner may read."""

    def __init__(self, root: Path):
        self.path = root / LEDGER_FILE

    def begin(self, federation_id: str, noise_multiplier: float, overwrite: bool) -> Ledger:
        """Begin a ledger.

        Raises:
            ValueError: if there is one with noise in it, and `overwrite` is not set: its rounds were deleted by hand.
        """
        if not overwrite and self.path.is_file() and (old := self._read()).releases:
            raise ValueError(
                f"`{self.path}` says that noise was drawn {len(old.releases)} times, but no round is there. What was spent is "
                "spent: put the rounds back and resume, or begin anew with `overwrite=True` (--overwrite), and count both "
                "federations' ε together."
            )
        ledger = Ledger(federation_id, noise_multiplier, secrets.token_hex(32))
        self._write(ledger)
        return ledger

    def resume(self, federation_id: str, records: Sequence[Mapping[str, Any]]) -> Ledger:
        """The ledger of a federation with these rounds.

        Raises:
            ValueError: if it is missing, another federation's, or older than the rounds.
        """
        ledger = self._read()
        done = max((record["privacy"]["releases"] for record in records if "privacy" in record), default=0)
        if ledger.federation_id != federation_id or len(ledger.releases) < done:
            raise ValueError(
                f"`{self.path}` has {len(ledger.releases)} releases of federation {ledger.federation_id}; the rounds are of "
                f"{federation_id} and have {done}. It is not the one that was written with them: put that one back."
            )
        return ledger

    def add(self, ledger: Ledger, number: int) -> Ledger:
        """Count a round's noise. It is on disk when this returns, and the noise may be drawn."""
        ledger = replace(ledger, releases=[*ledger.releases, number])
        self._write(ledger)
        return ledger

    def _read(self) -> Ledger:
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            if values.pop("schema") != SCHEMA_VERSION:
                raise ValueError(f"expected schema {SCHEMA_VERSION}")
            return Ledger(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`{self.path}` can't be read ({error}), so it is unknown what was spent. Restore it, or start another "
                "federation."
            ) from error

    def _write(self, ledger: Ledger) -> None:
        values = {
            "schema": SCHEMA_VERSION,
            "federation_id": ledger.federation_id,
            "noise_multiplier": ledger.noise_multiplier,
            "secret": ledger.secret,
            "releases": list(ledger.releases),
        }
        write_atomically(self.path, (json.dumps(values) + "\n").encode(), mode=0o600)
