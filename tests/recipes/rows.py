# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Where the recipes are, and rows for them."""

import json
from pathlib import Path

from tests.helpers import ROOT


RECIPES = ROOT / "recipes"
SCRIPTS = ("owner_warmup", "owner_labels", "sequence_classification", "causal_lm", "answers")
WORDS = ["graph", "node", "edge", "plot", "axis", "color", "matrix", "sum"]


def write_rows(path: Path, count: int) -> None:
    """Rows of two classes that share no word."""
    rows = []
    for index in range(count):
        words = WORDS[:4] if index % 2 else WORDS[4:]
        text = " ".join(words[(index // 2 + place) % 4] for place in range(3))
        rows.append({"text": text, "act": words[index % 4], "label": index % 2, "team": f"team-{index % 3}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
