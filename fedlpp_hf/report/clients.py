# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What each client did, cost and was refused for, summed over the rounds."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .metrics import Record


_RUN_FAILED = re.compile(r"its run failed: [A-Za-z_][\w.]*")
# Paths, addresses, tokens: what must not be in a file that is mailed. Quotes around them go, too.
_PRIVATE = re.compile(r"""[`'"]?(?:\S*[/\\@]\S*|hf_\w+|\S+:\d+)""")
_LONGEST = 100


@dataclass(slots=True)
class ClientSummary:
    """One client over all rounds.

    `asked` and `accepted` count rounds; `examples` are those of its last accepted update. `bytes_down` and `bytes_up` are None
    where a round did not record them. `seconds` has one entry for each answer.
    """

    client: str
    asked: int
    accepted: int
    refused: int
    examples: int | None
    bytes_down: int | None
    bytes_up: int | None
    seconds: list[float]

    @property
    def mean_seconds(self) -> float | None:
        """Seconds from the begin of its run (over a network: from sending the task) to its answer, over all answers."""
        return sum(self.seconds) / len(self.seconds) if self.seconds else None


def summarize_clients(records: Sequence[Record]) -> list[ClientSummary]:
    """All clients that were asked or answered, those that were refused most often first, else by name."""
    found: dict[str, ClientSummary] = {}
    for record in records:
        traffic = record.get("traffic")
        for name in _list_clients(record):
            client = found.setdefault(name, ClientSummary(name, 0, 0, 0, None, 0, 0, []))
            client.asked += name in record.get("asked", record["clients"])
            client.refused += name in record["rejected"]
            if name in record["clients"]:
                client.accepted += 1
                client.examples = record["clients"][name]["num_examples"]
            if traffic is None:
                client.bytes_down = client.bytes_up = None
                continue
            cost = traffic.get(name, {})  # nothing was sent to a client that was not asked
            if client.bytes_down is not None and client.bytes_up is not None:
                client.bytes_down += cost.get("bytes_down", 0)
                client.bytes_up += cost.get("bytes_up", 0)
            if cost.get("seconds") is not None:
                client.seconds.append(cost["seconds"])
    return sorted(found.values(), key=lambda client: (-client.refused, _natural(client.client)))


def count_reasons(records: Iterable[Record]) -> list[tuple[str, int]]:
    """Why updates were refused, without details, and how often; the most frequent first."""
    reasons = Counter(hide_details(reason) for record in records for reason in record["rejected"].values())
    return sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))


def hide_details(reason: str) -> str:
    """The part of a refusal that may leave the owner's machine: no message of an exception, path, address or token.

    In a simulation clients run where the owner's files are, and their errors name them.
    """
    failed = _RUN_FAILED.match(reason)
    text = failed.group() if failed else _PRIVATE.sub("…", reason.partition(": ")[0])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _list_clients(record: Record) -> list[str]:
    return list(dict.fromkeys([*record.get("asked", ()), *record["clients"], *record["rejected"]]))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """`site-2` before `site-10`."""
    parts = re.split(r"([0-9]{1,18})", name)  # text and numbers by turns
    return [(bool(place % 2), int(part) if place % 2 else 0, part) for place, part in enumerate(parts)]
