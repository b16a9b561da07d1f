# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The results of a simulation on disk: what was finished is not run again, and another simulation is not mixed with it."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..config.presets import Preset
from ..report.advice import Estimate, PresetResult, Recommendation, draw_advice, recommend, render_advice
from ..tensors.atomic import write_atomically


SCHEMA_VERSION = 1
_END = 2**16  # bytes
ADVICE_JSON, ADVICE_TABLE, ADVICE_PICTURE = "advice.json", "advice.md", "advice.png"
SETTINGS, RESULT, PRESET_OPTIONS = "advice_settings.json", "result.json", "preset.yaml"


def describe_model(full_model: str) -> str:
    """The model's name without the path, with a digest of the ends of its weight files, which tells models apart."""
    found = hashlib.sha256()
    for path in sorted(Path(full_model).glob("*.safetensors")):
        with open(path, "rb") as file:
            file.seek(-min(_END, path.stat().st_size), os.SEEK_END)
            found.update(file.read())
    return f"{Path(full_model).name} {found.hexdigest()[:12]}"


def open_output(directory: Path, now: Mapping[str, Any]) -> None:
    """Begin in an empty directory, or go on in that of the same simulation, which is described by `now`.

    Raises:
        ValueError: if the directory holds something else, or another simulation.
    """
    path = directory / SETTINGS
    if path.is_file():
        then = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in now if then.get(name) != json.loads(json.dumps(now[name]))]
        if differing:
            raise ValueError(
                f"`{directory}` holds the advice of another simulation: it differs in {', '.join(differing)}. Choose another "
                "output_dir, or delete that one."
            )
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"`{directory}` exists and holds something else; choose another output_dir.")
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(now, indent=2) + "\n").encode())


def write_result(directory: Path, result: PresetResult) -> None:
    """Write a preset's result beside its federation, last, and its options for `--config`."""
    (directory / PRESET_OPTIONS).write_text(yaml.safe_dump(dict(result.options)), encoding="utf-8")
    write_atomically(directory / RESULT, (json.dumps(asdict(result)) + "\n").encode())


def read_result(directory: Path, preset: Preset) -> PresetResult | None:
    """What an earlier call found, if it ran this preset to its end.

    Raises:
        ValueError: if it ran another preset of that name.
    """
    path = directory / RESULT
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    estimates = {name: Estimate(**values[name]) for name in ("stolen", "exposure", "healed")}
    result = PresetResult(**{**values, **estimates})
    if result.options != json.loads(json.dumps(dict(preset.options))):
        raise ValueError(
            f"`{directory}` has the result of another preset of that name. Rename this one, or delete that directory."
        )
    return result


def write_advice(
    directory: Path,
    settings: Mapping[str, Any],
    facts: Sequence[str],
    results: Sequence[PresetResult],
    max_stolen: float,
) -> Recommendation:
    """Write `advice.md`, `advice.json` and `advice.png`, and return what they recommend.

    Args:
        directory: For the files.
        settings: Of the simulation.
        facts: Sentences on what was simulated.
        results: Of the presets so far.
        max_stolen: Largest stolen value that the owner accepts.
    """
    recommendation = recommend(results, max_stolen)
    write_atomically(directory / ADVICE_TABLE, render_advice(results, recommendation, facts).encode())
    values = {
        "schema": SCHEMA_VERSION,
        "max_stolen": max_stolen,
        "recommendation": asdict(recommendation),
        "presets": [_summarize(result) for result in results],
        "settings": settings,
    }
    write_atomically(directory / ADVICE_JSON, (json.dumps(values, indent=2) + "\n").encode())
    draw_advice(results, recommendation, max_stolen, directory / ADVICE_PICTURE)
    return recommendation


def _summarize(result: PresetResult) -> dict[str, Any]:
    """A result without its rows, which are in the preset's own file."""
    values = asdict(result)
    rows = {
        f"loss_{name}": float(np.mean(values.pop(name))) if getattr(result, name) else None
        for name in ("before", "after")
    }
    return values | rows | {"gain": asdict(result.gain)}
