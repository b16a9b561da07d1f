# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Text from somebody else, made fit for a log, a record and a terminal."""

MAX_TEXT = 500


def make_printable(text: str, limit: int = MAX_TEXT) -> str:
    """At most `limit` characters of `text` in one line.

    Whatever does not print becomes a space: line breaks forge lines of a log, escape codes and marks of direction change what a
    terminal shows, and half a surrogate pair can't be stored.
    """
    # Twice the limit, so that a run of spaces does not hide what follows; the rest is never looked at.
    shown = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 2 * limit]).split())
    return shown if len(shown) <= limit and len(text) <= 2 * limit else f"{shown[:limit]}…"
