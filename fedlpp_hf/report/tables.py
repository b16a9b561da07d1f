# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Tables and units of what is printed."""

import math
from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of an aligned Markdown table; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def format_bytes(count: int) -> str:
    """Bytes in the largest unit that leaves at least one of it."""
    power = min(int(math.log(max(count, 1), 1000)), 4)
    power += power < 4 and count / 1000**power >= 999.95  # else rounding would show 1000.0 of the smaller unit
    return f"{count / 1000**power:.{0 if power == 0 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
