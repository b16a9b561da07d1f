# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The real encoder that benchmarks run on."""

from pathlib import Path

from recipes.owner_warmup import find_package_model


def find_encoder() -> Path:
    """The directory of the quickstart's MiniLM, whose weights are the expected ones; ends the benchmark where it is not
    installed."""
    try:
        return find_package_model()
    except ValueError as error:
        raise SystemExit(f"This benchmark needs the encoder of the demo. {error}") from None
