# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What Flower's processes run in: a tested version of it, and an environment without telemetry and update checks."""

import os
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from ..config.extras import install_command


# Names the JSON file with the server's configuration and flags. The usual place, the run's configuration, is sent to every
# client, and the flags name the owner's model.
SERVER_FILE = "FEDLPP_HF_SERVER"
_ASK_NO_PROXY = {
    "FORWARDED_ALLOW_IPS": "",
    # Servers of the same APIs on other ports, which no gate stands in front of.
    "FLWR_INTERNAL_GRPC_CONTROL_API": "0",
    "FLWR_INTERNAL_GRPC_FLEET_API": "0",
}


def check_flower() -> None:
    """Check that all of the extra `flower` is installed, and refuse an untested Flower: another SuperLink may serve
    other paths than the gate of `superlink.py` knows.

    Raises:
        ValueError: if a package is not installed, or the version of flwr is outside the range of the extra.
    """
    # The range is in setup.cfg. There the extra's marker also tells the first Python version with a Flower.
    requirements = [Requirement(text) for text in requires("fedlpp_hf") or ()]
    expected = next(requirement.specifier for requirement in requirements if requirement.name == "flwr")
    try:
        installed = version("flwr")
    except PackageNotFoundError:
        raise ValueError(
            f"This needs Flower (flwr{expected}, on Python 3.11 or newer): {install_command('flower')}"
        ) from None
    if not expected.contains(installed, prereleases=True):
        raise ValueError(
            f"flwr {installed} is installed; this version of fedlpp_hf was tested with flwr{expected} only. Run "
            f"pip install 'flwr{expected}'."
        )
    for requirement in requirements:
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": "flower"}) and not marker.evaluate({"extra": ""}):
            _check_installed(requirement.name)


def _check_installed(package: str) -> None:
    try:
        version(package)
    except PackageNotFoundError:
        raise ValueError(f"This needs `{package}`, which is not installed: {install_command('flower')}") from None


def ignore_proxies() -> None:
    """Make Flower's servers in this process take no caller's word for who it is.

    By default they believe `X-Forwarded-For` of whoever connects from 127.0.0.1; it would name another user's connection.
    """
    os.environ |= _ASK_NO_PROXY


def make_environment(state_dir: Path) -> dict[str, str]:
    """The environment variables for Flower's processes that keep their files in `state_dir`."""
    return os.environ | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(state_dir / "flwr"),
        **_ASK_NO_PROXY,
        SERVER_FILE: str(state_dir / "server.json"),
        # Flower finds its own commands by name.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
