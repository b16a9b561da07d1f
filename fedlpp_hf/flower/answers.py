# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The strict reader of what clients answer: each answer is what its request asked for, in type, length and range, or an error.

Nothing else looks into an answer. A client that breaks a rule is refused by name, and the federation goes on.
"""

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from ..wire.text import make_printable


if TYPE_CHECKING:
    from ..wire.encoding import MessageLimit
    from ..wire.messages import ClientUpdate
    from .grid_requests import Answer

MAX_ID = 100  # characters of a client's id
MAX_ROWS = 10**9  # of a client


class RefusalError(ValueError):
    """What a client said itself, or did not say in time: not a broken rule."""


def read_description(answer: "Answer", most: int, hides_rows: bool = False) -> dict[str, int | None] | int:
    """What a node says of itself: the numbers of rows of its clients, or the bytes of the base that it has so far.

    Args:
        answer: to `DESCRIBE` or `BASE`.
        most: clients that one node may have.
        hides_rows: whether clients keep their numbers of rows to themselves; then each is None.

    Raises:
        RefusalError: if the node did not answer, or answered that it can't take part.
        ValueError: if it broke a rule.
    """
    content = _read_content(answer, ("clients", "received"))
    if "received" in content:
        return _read_int(content["received"], "bytes of the base", 0, 2**63 - 1)
    text = content["clients"]
    # JSON writes a character in up to 12, as two halves of a pair.
    if type(text) is not str or len(text) > 100 + most * (12 * MAX_ID + 20):
        raise ValueError(f"its `clients` are no text, or longer than those of {most} clients")
    try:
        clients = json.loads(text, object_pairs_hook=_make_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its `clients` can't be read ({error})") from None
    if type(clients) is not dict or not 0 < len(clients) <= most:
        raise ValueError(f"its `clients` are {clients!r:.100}; expected 1 to {most} ids with their numbers of rows")
    for client, rows in clients.items():
        check_client_id(client)
        if (rows is None) != hides_rows:
            raise ValueError(
                f"it runs with secure_aggregation={rows is None}, and this server with secure_aggregation={hides_rows}; set the same"
            )
        if rows is not None:
            _read_int(rows, f"rows of client {client!r}", 1, MAX_ROWS)
    return clients


def check_client_id(client: str) -> None:
    """Refuse an id that can't be shown in a line of a log.

    Raises:
        ValueError: saying what an id may be.
    """
    if not (0 < len(client) <= MAX_ID and client.isprintable() and client == client.strip()):
        raise ValueError(
            f"{client!r:.120} is no client id; expected 1 to {MAX_ID} printable characters, without a space at either end"
        )


def read_update(client: str, answer: "Answer", limit: "MessageLimit") -> "ClientUpdate":
    """A client's answer to its task.

    Args:
        client: whose task it was.
        answer: to `TRAIN`.
        limit: of an update's size.

    Raises:
        RefusalError: if the client did not answer, or answered that it failed.
        ValueError: if it broke a rule.
    """
    from ..wire.messages import ClientUpdate

    data = _read_content(answer, ("update",))["update"]
    if type(data) is not bytes:
        raise ValueError(f"its `update` is a {type(data).__name__}; expected bytes")
    update = ClientUpdate.from_bytes(data, limit)
    if update.client_id != client:
        raise ValueError(f"it answered as client {update.client_id!r:.120}")
    return update


def read_sum(answer: "Answer") -> bytes:
    """A client's answer to its task, or to a later step, under secure aggregation. [`SumServer`] reads the bytes.

    Raises:
        RefusalError: if the client did not answer, or answered that it failed.
        ValueError: if it broke a rule.
    """
    data = _read_content(answer, ("sum",))["sum"]
    if type(data) is not bytes:
        raise ValueError(f"its `sum` is a {type(data).__name__}; expected bytes")
    return data


def _read_content(answer: "Answer", names: Collection[str]) -> Mapping[str, Any]:
    """An answer that has exactly one of `names`."""
    if isinstance(answer, str):
        raise RefusalError(answer)
    if set(answer) == {"error"} and type(answer["error"]) is str:
        raise RefusalError(make_printable(answer["error"]))
    if len(answer) != 1 or not set(answer) <= set(names):
        found = make_printable(", ".join(f"`{name}`" for name in list(answer)[:3]), 100) or "nothing"
        raise ValueError(f"its answer has the fields {found}; expected {' or '.join(names)} alone")
    return answer


def _read_int(value: Any, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:  # a bool is an int, too
        raise ValueError(f"it has {value!r:.40} {what}; expected a number from {least} to {most}")
    return value


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("it has a key twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of rows")
