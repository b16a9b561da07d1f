# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The data of the quickstart: masked, without repetitions, the same each time."""

import json
import re
import sys

import pytest


pytest.importorskip("sklearn")


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Wrap a NumPy array with `np.asarray` first.", "Wrap a name array with name first."),
        ("See [`~transformers.Trainer`] or :class:`Axes` now.", "See name or name now."),
        ("Fit max_iter times.\n\nParameters\n----------\nx : array", "Fit name times."),
        ("Fit twice.\n\nArgs:\n    x: array", "Fit twice."),
        ("A DataFrame from pandas, in 2d.", "A name from name, in name."),
    ],
)
def test_masks_what_gives_the_library_away(load_recipe, docstring, expected):
    assert load_recipe("docstrings").mask_text(docstring) == expected


def test_drops_near_repetitions(load_recipe):
    docstrings = load_recipe("docstrings")
    texts = [
        ("a", "draw the edges of one graph in its color"),
        ("a", "draw the nodes of one graph in its color"),  # like the first: the second of a library goes
        ("a", "compute an eigenvalue with power iterations"),
        ("b", "compute an eigenvalue with inverse iterations"),  # like another library's: both go
    ]
    rows = [{"text": text, "label": label} for label, text in texts]
    assert docstrings.drop_repeated(rows) == rows[:1]


def test_is_deterministic_and_its_splits_are_disjoint(load_recipe, tmp_path, monkeypatch):
    docstrings = load_recipe("docstrings")
    for name in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["docstrings.py", str(tmp_path / name), "--rows", "120"])
        docstrings.main()
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["labels.json", "owner.jsonl", "test.jsonl", "train.jsonl", "validation.jsonl"]
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    rows = [
        json.loads(line)
        for split in docstrings.SPLITS
        for line in (tmp_path / "first" / f"{split}.jsonl").read_text().splitlines()
    ]
    assert len(rows) > 60
    assert len({row["text"] for row in rows}) == len(rows)
    assert {row["label"] for row in rows} == set(range(len(docstrings.LIBRARIES)))
    text = " ".join(row["text"] for row in rows).lower()
    assert not re.findall(r"\b(?:matplotlib|networkx|pandas|sklearn|scikit|sympy|transformers)\b|[_`\d]", text)
