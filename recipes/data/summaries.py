# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Instructions for a chat model, made of what every installation has: a description → the docstring's one-line summary.

    python recipes/data/summaries.py out/summaries

reads the source files of three installed libraries and of Python (it imports none of them) and writes `train`, `test` and `owner` as
`.jsonl`, with `prompt`, `completion` and `library`. A docstring whose first paragraph is one sentence and whose second describes it
in prose becomes a row. Each library is a client, with its own subject and habits; the owner's rows are Python's own. Files with test
rows give no training rows. The result depends on the installed versions and the arguments alone.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docstrings import SECTION, draw, drop_repeated, find_source, list_files, read_docstrings


# What torch and datasets bring along; Python is the owner's.
CLIENTS, OWNER = ("networkx", "pandas", "sympy"), "python"
INSTRUCTION = "Write a one-line docstring summary for this description:"
SUMMARY_WORDS, MIN_WORDS, MAX_WORDS, MAX_PER_FILE = range(4, 13), 12, 32, 8
TEST_SHARE = 0.25
MARKUP = re.compile(r"[`=\\<>{}$@|*_:()\[\]]|\d{3}")


def read_row(docstring: str) -> tuple[str, str] | None:
    """(description, summary) if the docstring has both in prose."""
    summary, _, rest = docstring.partition("\n\n")
    body = rest.lstrip("\n").partition("\n\n")[0]
    if any(SECTION.match(line.strip()) for line in body.splitlines()):
        return None
    summary, words = " ".join(summary.split()), body.split()
    one_sentence = summary.endswith(".") and ". " not in summary and len(summary.split()) in SUMMARY_WORDS
    description = " ".join(words[:MAX_WORDS]) + ("" if len(words) <= MAX_WORDS else " ...")
    if not one_sentence or len(words) < MIN_WORDS or MARKUP.search(summary + description):
        return None
    return description, summary


def collect_rows(library: str, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of a library and where they are from, with files in an order drawn by `seed`."""
    root = find_source(library)
    for path in list_files(root, seed):
        found = [row for docstring in read_docstrings(root / path) if (row := read_row(docstring))]
        for description, summary in found[:MAX_PER_FILE]:
            prompt, file = f"{INSTRUCTION}\n{description}", f"{library}/{path.as_posix()}"
            row = {"prompt": prompt, "completion": summary, "library": library}
            yield {"text": f"{summary} {description}", "label": library, "file": file, "row": row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # A method of Series and the same of DataFrame differ in a word or two.
    found = drop_repeated([row for library in (*CLIENTS, OWNER) for row in collect_rows(library, args.seed)])
    found.sort(key=lambda row: draw(args.seed, "order", row["text"]))
    splits: dict[str, list[dict[str, str]]] = {"train": [], "test": [], "owner": []}
    for row in found:
        split = "test" if draw(args.seed, "test", row["file"]) < TEST_SHARE else "train"
        splits["owner" if row["label"] == OWNER else split].append(row["row"])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, kept in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (args.output_dir / f"{split}.jsonl").write_text(text, encoding="utf-8")
        counts = {library: sum(row["library"] == library for row in kept) for library in (*CLIENTS, OWNER)}
        print(f"{split}: " + ", ".join(f"{count} {library}" for library, count in counts.items() if count))


if __name__ == "__main__":
    main()
