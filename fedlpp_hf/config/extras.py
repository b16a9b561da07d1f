# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""How to install what is missing. It needs nothing but the standard library."""

REPOSITORY = "https://github.com/fedlpp/fedlpp_hf"


def install_command(extra: str) -> str:
    """The command that installs this library with `extra`, e.g. `flower`.

    It names the source: there is no release, and on PyPI anyone could take the name.
    """
    return f"pip install 'fedlpp_hf[{extra}] @ git+{REPOSITORY}'"
