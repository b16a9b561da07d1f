# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The presets that `fedlpp-hf advise` compares: what an owner chooses between before it asks a partner.

A new one is an entry of `PRESETS`. Options that all presets share, such as the learning rate, are not in it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rounds import RoundOptions
from .spelling import suggest
from .yaml_files import read_yaml


@dataclass(frozen=True, slots=True)
class Preset:
    """A way to run a federation.

    Args:
        name: Names it in tables, and its directory.
        summary: What it does, in a few words.
        options: Of [`FederatedConfig`]. Local steps are not among them: each client has as many in every preset, divided
            among the rounds.
        selects: Whether the owner's selection rows choose what the server keeps.
    """

    name: str
    summary: str
    options: Mapping[str, Any]
    selects: bool = True


_SENT: dict[str, Any] = {"num_rounds": 3, "base_bits": 4, "adapter_bits": 4, "broadcast": "every_round"}
_NOTHING_SENT: dict[str, Any] = {"num_rounds": 1, "broadcast": "never", "base_weights": [0.0, 0.25, 0.5, 0.75]}
_VARIATE: dict[str, Any] = {"control_variate": 1.0, "control_variate_runs": 4}
_PRODUCTS: dict[str, Any] = {"num_rounds": 3, "aggregation": "exact", "update_scales": [1.0, 0.5, 0.75, 1.25, 1.5]}

PRESETS = (
    Preset("fedlpp", "the paper's rule: a 4-bit adapter is sent in each of 3 rounds", _SENT, selects=False),
    Preset("fedlpp-variate", "the same, and the owner subtracts what only repairs the base", _SENT | _VARIATE),
    Preset(
        "light",
        "nothing is sent but a 4-bit base; the owner chooses, and trains nothing",
        _NOTHING_SENT | _PRODUCTS | {"base_bits": 4},
    ),
    Preset("balanced", "nothing is sent but a 4-bit base", _NOTHING_SENT | _VARIATE | {"base_bits": 4}),
    Preset("strict", "nothing is sent but a 3-bit base", _NOTHING_SENT | _VARIATE | {"base_bits": 3}),
)

# What the simulation of a preset sets itself.
FIXED: dict[str, Any] = {"audit": True, "merge": False, "report_to": "none", "disable_tqdm": True}
_SET_BY_SIMULATION = (
    "output_dir", "full_model", "resume_from_checkpoint", "overwrite", "audit_steps", "audit_rows", *FIXED,
)  # fmt: skip


def choose_presets(names: Sequence[str] | None, files: Mapping[str, str]) -> list[Preset]:
    """The presets of those `names` (all, if None), and those that users have in YAML `files`, by name.

    Raises:
        ValueError: for an unknown name, one that is taken, or an option that a preset can't set.
    """
    known = {preset.name: preset for preset in PRESETS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"There is no preset `{name}`{suggest(name, known)} Expected some of {', '.join(known)}.")
    found = [preset for preset in PRESETS if names is None or preset.name in names]
    for name, path in files.items():
        if name in known:
            raise ValueError(f"The preset `{name}` exists already; give yours another name.")
        options = read_yaml(path)
        if wrong := [option for option in options if option in _SET_BY_SIMULATION]:
            raise ValueError(f"`{path}` sets `{wrong[0]}`, which the simulation sets itself. Leave it out.")
        found.append(Preset(name, f"options of {Path(path).name}", options))
    return found


def make_flags(options: Mapping[str, Any]) -> list[str]:
    """Options as flags, for [`parse_args`]; None is left out."""
    flags: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        texts = [json.dumps(entry) if isinstance(entry, dict) else str(entry) for entry in values if entry is not None]
        flags += [f"--{name}", *texts] if texts else []
    return flags


def divide_steps(options: Mapping[str, Any], steps: int) -> int:
    """Local steps of one round, so that a client has `steps` in all rounds.

    Raises:
        ValueError: if there are more rounds than steps.
    """
    rounds = int(options.get("num_rounds") or RoundOptions.num_rounds)
    if steps < rounds:
        raise ValueError(f"steps={steps} in {rounds} rounds; expected at least one step in each round. Raise steps.")
    return steps // rounds
