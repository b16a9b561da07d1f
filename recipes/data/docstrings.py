# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The quickstart's dataset, made of what every installation has: which library is a docstring from?

    python recipes/data/docstrings.py out/docstrings

reads the source files of six installed libraries (it imports none of them) and writes `train`, `validation`, `test` and
`owner` as `.jsonl`, with `text`, `label` and `team`, and the names of the classes in `labels.json`. Everything that
would give a library away is masked: its names, identifiers, code and cross references. The owner's rows are its own
small sample of the task. `team` is the natural client: a team maintains a few submodules of several libraries, so teams
differ in topics and in the mix of labels. The result depends on the installed versions and the arguments alone.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer


# Dependencies of fedlpp_hf[demo]. Each has its own subject, so that its prose tells without its names.
LIBRARIES = (
    "matplotlib", "networkx", "pandas", "sklearn", "sympy", "transformers",
)  # fmt: skip
OTHER_NAMES = "accelerate aten bitsandbytes cuda cudnn datasets face hugging huggingface hub np nx pd peft plt py pyplot pytorch scikit sk sp"
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "extern", "externals", "idlelib", "lib2to3", "site-packages"}
MASK = "name"
MAX_WORDS, MIN_WORDS, MAX_PER_FILE = 32, 10, 8
NUM_TEAMS = 5
SPLITS = {"owner": 0.06, "validation": 0.06, "test": 0.2, "train": 0.68}

CODE = re.compile(
    r"\[`[^`]*`\]"  # [`Trainer`]
    r"|:\w+(?::\w+)?:`[^`]*`"  # :class:`Figure`
    r"|`+[^`]*`+_?"  # ``axis``, `axis`
    r"|\$[^$]*\$"
    r"|https?://\S+"
    r"|\S*[\w)\]](?:\.|::)\w\S*"  # os.path
    r"|\S*_\S*|\S*\w\(\S*|\S*[=<>@\\{}|]\S*"  # snake_case, call(), a=b
    r"|\b\w*[a-z0-9]\w*[A-Z]\w*|\b[A-Z]{2,}[a-z]\w*"  # CamelCase
    r"|\b\w*\d\w*"
)
NAMES = re.compile(rf"\b(?:{'|'.join([*LIBRARIES, *OTHER_NAMES.split()])})s?\b(?:[- ](?:learn|face))?", re.IGNORECASE)
SECTION = re.compile(r"^(?:\w[\w ]*:|[=\-~^]{3,}|>>>.*|\.\. .*|:\w+.*)$")


def find_source(library: str) -> Path:
    """The folder of an installed library, which is not imported."""
    if library == "python":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise SystemExit(f"`{library}` is not installed; run `pip install -c constraints.txt '.[demo]'`.")
    return Path(spec.origin).parent


def draw(*keys: object) -> float:
    """A number in [0, 1) that is a function of `keys`."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:6], "big") / 2**48


def list_files(root: Path, seed: int) -> list[Path]:
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in files if not SKIPPED_FOLDERS.intersection(path.parts) and "test" not in path.name]
    return sorted(kept, key=lambda path: draw(seed, root.name, path.as_posix()))


def read_docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a template, or a file for another version of Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            public = not getattr(node, "name", "").startswith("_")
            docstring = ast.get_docstring(node) if public else None
            if docstring and docstring.isascii():
                yield docstring


def mask_text(docstring: str) -> str:
    """The first sentences of a docstring up to its first section, without what gives the library away."""
    lines = []
    for line in docstring.splitlines():
        if SECTION.match(line.strip()):
            # A heading underlined, as numpydoc has it, is the line before.
            if set(line.strip()) <= set("=-~^") and lines:
                lines.pop()
            break
        lines.append(line.strip())
    text = NAMES.sub(MASK, CODE.sub(f" {MASK} ", " ".join(lines)))
    text = re.sub(r"[^A-Za-z.,;:'?! -]+", " ", text)
    text = re.sub(rf"\b{MASK}\b(?:[ .,:'-]+\b{MASK}\b)+", MASK, re.sub(r"\s+([.,;:?!]*)", r"\1 ", text))
    return " ".join(text.split()[:MAX_WORDS])


def collect_rows(library: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """Up to `count` rows of a library, from files in an order drawn by `seed`."""
    root = find_source(library)
    for path in list_files(root, seed):
        texts = [mask_text(docstring) for docstring in read_docstrings(root / path)]
        long_enough = [text for text in texts if sum(word != MASK for word in text.split()) >= MIN_WORDS]
        for text in long_enough[:MAX_PER_FILE]:
            if count == 0:
                return
            count -= 1
            # `sympy.polys.rings`: the unit that a team maintains.
            yield {"text": text, "label": library, "module": ".".join([library, *path.with_suffix("").parts[:2]])}


def drop_repeated(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows that share less than half of their words with every other (Jaccard similarity of the masked texts).

    Of two similar rows of a library the first is kept, of two libraries none: they would be one text with two answers.
    """
    words = CountVectorizer(binary=True, stop_words=[MASK]).fit_transform([row["text"] for row in rows])
    sizes = words.getnnz(axis=1)
    shared = (words @ words.T).tocoo()
    similar = (shared.row < shared.col) & (3 * shared.data >= sizes[shared.row] + sizes[shared.col])
    dropped = set()
    for first, second in zip(shared.row[similar].tolist(), shared.col[similar].tolist(), strict=True):
        dropped.add(second)
        if rows[first]["label"] != rows[second]["label"]:
            dropped.add(first)
    return [row for index, row in enumerate(rows) if index not in dropped]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--rows", type=int, default=3600, help="docstrings to read; about a tenth is dropped again")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    per_library = args.rows // len(LIBRARIES)
    rows = drop_repeated([row for library in LIBRARIES for row in collect_rows(library, per_library, args.seed)])
    rows.sort(key=lambda row: draw(args.seed, "order", row["text"]))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    end = 0
    for split, share in SPLITS.items():
        start, end = end, end + round(share * len(rows))
        with open(args.output_dir / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for row in rows[start:end]:
                team = f"team-{int(draw(args.seed, 'team', row['module']) * NUM_TEAMS) + 1}"
                line = {"text": row["text"], "label": LIBRARIES.index(row["label"]), "team": team}
                file.write(json.dumps(line) + "\n")
        print(f"{args.output_dir}/{split}.jsonl: {min(end, len(rows)) - start} rows")
    (args.output_dir / "labels.json").write_text(json.dumps(LIBRARIES) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
