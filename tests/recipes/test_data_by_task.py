# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The small datasets of the recipes by task: what is in them, and that they are the same each time."""

import importlib
import json
import shutil
import sys

import pytest

from .rows import RECIPES


pytest.importorskip("sklearn")
MODULES = ("docstring_tasks", "docstrings", "digits", "spoken_numbers")


@pytest.fixture
def load(monkeypatch):
    """Import a script of recipes/data."""
    monkeypatch.syspath_prepend(str(RECIPES / "data"))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


def test_prose_ends_at_the_first_section(load):
    list_paragraphs = load("docstring_tasks").list_paragraphs
    docstring = "Sum the\n    numbers.\n\n    They may be `many`.\n\n    Parameters\n    ----------\n    x : array"
    assert list_paragraphs(docstring) == ["Sum the numbers.", "They may be `many`."]
    assert list_paragraphs("Sum.\n\n>>> sum([1])") == ["Sum."]


def test_summaries_have_no_markup_and_bodies_are_cut(load):
    split_summary = load("docstring_tasks").split_summary
    body = " ".join(f"``word{number}``" for number in range(50))
    summary, cut = split_summary(["Return the `x` of :class:`~a.B` now.", body])
    assert summary == "Return the x of ~a.B now." and cut.split() == [f"word{number}" for number in range(40)]
    assert split_summary(["Too short.", body]) is None and split_summary(["A summary long enough.", "no body"]) is None


def test_code_is_tagged_where_authors_marked_it(load):
    row = load("docstring_tasks").tag_code("Give ``max iter`` or `tol` to the solver, and read its results from it.")
    assert row["tokens"][:5] == ["Give", "max", "iter", "or", "tol"]
    assert row["ner_tags"] == ["O", "B-CODE", "I-CODE", "O", "B-CODE"] + ["O"] * 9
    assert (
        load("docstring_tasks").tag_code("No code, however long the text of this docstring may well become.") is None
    )


def test_shuffled_words_are_the_same_words_in_another_order(load):
    shuffle_words = load("docstring_tasks").shuffle_words
    for text in ("one two", "sum all the numbers of one list", "a b c"):
        assert shuffle_words(text, 0) != text and sorted(shuffle_words(text, 0).split()) == sorted(text.split())
        assert shuffle_words(text, 0) == shuffle_words(text, 0)


@pytest.mark.slow
def test_docstring_tasks(load, tmp_path, monkeypatch):
    for name in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["docstring_tasks.py", str(tmp_path / name), "--rows", "60"])
        load("docstring_tasks").main()
    tasks = {path.name for path in (tmp_path / "first").iterdir()}
    assert tasks == {"chats", "preferences", "prompts", "summaries", "pairs", "tokens"}
    for path in (tmp_path / "first").rglob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()
    for task in tasks:
        splits = {
            split: [
                json.loads(line) for line in (tmp_path / "first" / task / f"{split}.jsonl").read_text().splitlines()
            ]
            for split in ("train", "test", "owner")
        }
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 42, "test": 12, "owner": 6}
        assert {row["team"] for row in splits["train"]} == {"team-1", "team-2", "team-3"}
    for row in (json.loads(line) for line in (tmp_path / "first" / "preferences" / "train.jsonl").open()):
        assert row["chosen"] != row["rejected"]


def test_digits(load, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(sys, "argv", ["digits.py", str(tmp_path)])
    load("digits").main()
    counts = {split: len(list((tmp_path / split).rglob("*.png"))) for split in ("train", "test", "validation")}
    assert counts == {"train": 1258, "test": 359, "validation": 180}
    names = [path.name for path in tmp_path.rglob("*.png")]
    assert len(set(names)) == len(names) == 1797
    assert {path.name for path in (tmp_path / "train").iterdir()} == {str(digit) for digit in range(10)}
    with Image.open(next((tmp_path / "train" / "3").iterdir())) as image:
        assert image.size == (8, 8) and image.mode == "L" and image.getextrema()[1] > 200


def test_spoken_numbers(load, tmp_path, monkeypatch):
    script = load("spoken_numbers")
    assert [script.spell(number) for number in (0, 13, 20, 42, 99)] == [
        "zero",
        "thirteen",
        "twenty",
        "forty two",
        "ninety nine",
    ]
    if shutil.which("espeak-ng") is None:
        monkeypatch.setattr(sys, "argv", ["spoken_numbers.py", str(tmp_path)])
        with pytest.raises(SystemExit, match="apt install espeak-ng"):
            script.main()
        pytest.skip("espeak-ng is not installed")
    soundfile = pytest.importorskip("soundfile", reason="needs the extra [speech]")
    monkeypatch.setattr(sys, "argv", ["spoken_numbers.py", str(tmp_path), "--rows", "10"])
    script.main()
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 7 and {row["voice"] for row in rows} == set(script.VOICES)
    sound = soundfile.info(str(tmp_path / rows[0]["audio"]))
    assert sound.samplerate == 22050 and 0.5 < sound.duration < 5
