# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The command as a function, and adapters for it."""

from pathlib import Path

import pytest

from fedlpp_hf.cli.main import main
from tests.helpers import make_llama_adapter


@pytest.fixture
def run(capsys):
    """Run the command; returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        else:
            code = 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def adapters(full_llama, tmp_path_factory) -> list[Path]:
    """Two adapters on [`full_llama`] that are not zero."""
    root = tmp_path_factory.mktemp("adapters")
    return [make_llama_adapter(full_llama, root / f"adapter-{seed}", seed) for seed in (0, 1)]
