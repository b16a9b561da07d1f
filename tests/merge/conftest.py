# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Merges in tests do not wait for the disk."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk is most of a small merge, and no test pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
