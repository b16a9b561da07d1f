# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Whether the installed Flower is one that this library was tested with: nothing else stands between a newer SuperLink,
whose doors may be elsewhere, and the gate of `superlink.py`.
"""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def check_flower() -> None:
    """
    Raises:
        ValueError: if flwr is not installed, or in another version than the extra `flower` asks for.
    """
    # setup.cfg has the range. The extra's marker also says from which Python on there is a Flower at all.
    requirements = map(Requirement, requires("fedlpp_hf") or ())
    expected = next(requirement.specifier for requirement in requirements if requirement.name == "flwr")
    try:
        installed = version("flwr")
    except PackageNotFoundError:
        raise ValueError(
            f"This needs Flower (flwr{expected}, on Python 3.11 or newer): pip install 'fedlpp_hf[flower]'."
        ) from None
    if not expected.contains(installed, prereleases=True):
        raise ValueError(
            f"flwr {installed} is installed; this version of fedlpp_hf was tested with flwr{expected} only. Run "
            f"pip install 'flwr{expected}'."
        )
