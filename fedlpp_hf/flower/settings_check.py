# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Check a federation's configuration before anything starts, in a separate process: the one that waits for rounds must not
keep torch in memory.

    python -m fedlpp_hf.flower.settings_check JSON
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .trainer_file import find_trainer, read_reference


def check_settings(
    config: str, flags: Sequence[str], other_options: Sequence[str] = (), policy: str | None = None
) -> None:
    """Read the configuration as server and clients will, and a client's policy.

    Args:
        config: YAML file of the federation.
        flags: flags that override it.
        other_options: of the command, parsed already; a mistyped flag may mean one of them.
        policy: YAML file of a client's own conditions.

    Raises:
        ValueError: with the reason, if the configuration, a flag or the policy is wrong.
    """
    find_trainer(read_reference(config), Path(config).parent)
    request = json.dumps([config, list(flags), list(other_options), policy])
    command = [sys.executable, "-m", "fedlpp_hf.flower.settings_check", request]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"the check of `{config}` ended with code {result.returncode}"]
        raise ValueError(lines[-1].partition(": error: ")[2] or lines[-1])


def main() -> None:
    """Read the settings; the last line of standard error says what is wrong with them."""
    from ..client.policy import ClientPolicy
    from .loading import read_settings

    config, flags, other_options, policy = json.loads(sys.argv[1])
    try:
        read_settings(config, flags, other_options)
        if policy is not None:
            ClientPolicy.read(policy)
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
