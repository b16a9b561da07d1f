# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Tables are aligned Markdown, and bytes are readable."""

import pytest

from fedlpp_hf.report.tables import format_bytes, format_table


def test_table_is_aligned_markdown():
    lines = format_table([["model", "x"], ["a", "12345"], ["longer name", ""]])
    assert lines == [
        "| model       | x     |",
        "|-------------|-------|",
        "| a           | 12345 |",
        "| longer name |       |",
    ]


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1234, "1.2 kB"),
        (10**6, "1.0 MB"),
        (2_500_000, "2.5 MB"),
        (10**9, "1.0 GB"),
        (5 * 10**12, "5.0 TB"),
        (7 * 10**15, "7000.0 TB"),
    ],
)
def test_bytes_are_readable(count, text):
    assert format_bytes(count) == text
