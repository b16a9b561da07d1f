# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Each test has a Hub on another port, and transformers must not remember the last one."""

import pytest


@pytest.fixture(autouse=True)
def fresh_api(monkeypatch):
    """The one HfApi of a process keeps the address that it was made with."""
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
