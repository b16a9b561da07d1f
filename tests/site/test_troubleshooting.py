# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""docs/troubleshooting.md quotes messages that the package still has."""

import ast
import re
from functools import cache

import pytest

from tests.helpers import ROOT


# The first cell of each row of a table: one or more quoted messages.
QUOTED = [
    message
    for line in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| message")
    for message in re.findall(r"`([^`]+)`", line.split(" | ")[0])
]


@cache
def list_messages() -> list[str]:
    """Every text of the package's source, with … for what is put in; named constants are put in."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "fedlpp_hf").rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    constants = {
        node.targets[0].id: node.value.value
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }

    def read(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(read, node.values))
        if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
            return constants.get(node.value.id, "…")
        return "…"

    texts = [read(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    return [text.replace("`", "") for text in texts]


@pytest.mark.parametrize("quoted", QUOTED)
def test_message_is_in_the_source(quoted):
    pieces = [re.escape(piece) for piece in quoted.split("…")]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    assert any(pattern.search(message) for message in list_messages()), (
        "quote it as it is now, with … for what differs"
    )


def test_the_page_quotes_messages():
    assert len(QUOTED) > 50
