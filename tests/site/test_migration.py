# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""docs/migration.md names the numbers that the package writes."""

import pytest

from fedlpp_hf.audit import report
from fedlpp_hf.base import manifest
from fedlpp_hf.server import store
from fedlpp_hf.wire import encoding
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ("row", "now"),
    [
        ("| state of a federation | schema {} |", store.SCHEMA_VERSION),
        ("| messages | schema {} |", encoding.SCHEMA_VERSION),
        ("| a base | format {} |", manifest.FORMAT_VERSION),
        ("| an audit | schema {} |", report.SCHEMA_VERSION),
    ],
)
def test_numbers_are_those_of_this_version(row, now):
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    assert row.format(now) in text, "say in both tables what changed"
