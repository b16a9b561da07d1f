# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The quickstart's dataset, made of what every installation has: which library is a docstring from?

    python recipes/data/docstrings.py out/docstrings

reads the source files of ten installed libraries (it imports none of them) and writes `train`, `validation`, `test` and
`owner` as `.jsonl`, with `text`, `label` and `team`, and the names of the classes in `labels.json`. Everything that
would give a library away is masked: its names, identifiers, code and cross references. The owner's rows are its own
small sample of the task. `team` is the natural client: a team maintains a few submodules of several libraries, so teams
differ in topics and in the mix of labels. All docstrings of a file are in the same split. The result depends on the
installed versions and the arguments alone.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


# Dependencies of fedlpp_hf[demo]. Each has its own subject, so that its prose tells without its names.
LIBRARIES = (
    "matplotlib", "networkx", "numpy", "pandas", "python", "scipy", "sklearn", "sympy", "torch", "transformers",
)  # fmt: skip
OTHER_NAMES = "accelerate aten bitsandbytes cuda cudnn datasets face hugging huggingface hub np nx pd peft plt py pyplot pytorch scikit sk sp"
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "extern", "externals", "idlelib", "lib2to3", "site-packages"}
MASK = "name"
MAX_WORDS, MIN_WORDS, MAX_PER_FILE = 40, 5, 8
NUM_TEAMS = 5
# Shares of the files. The owner's is the smallest but for its own use, the test split the one that is reported.
SPLITS = {"train": 0.68, "validation": 0.08, "test": 0.12, "owner": 0.12}

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
        raise SystemExit(f"`{library}` is not installed; run `pip install 'fedlpp_hf[demo]'`.")
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
            docstring = ast.get_docstring(node)
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


def list_words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text.lower()) if word != MASK]


def collect_rows(library: str, count: int, seed: int) -> list[dict[str, str]]:
    """Up to `count` rows of a library, no two of them alike."""
    root = find_source(library)
    rows, seen = [], set()
    for path in list_files(root, seed):
        kept = 0
        # `torch.nn` for torch/nn/modules/linear.py: the unit that a team maintains.
        module = f"{library}.{path.parts[0].removesuffix('.py')}"
        for docstring in read_docstrings(root / path):
            text = mask_text(docstring)
            words = list_words(text)
            keys = {" ".join(sorted(set(words))), " ".join(words[:7])}
            if len(words) < MIN_WORDS or keys & seen or kept == MAX_PER_FILE:
                continue
            seen |= keys
            kept += 1
            rows.append({"text": text, "label": library, "module": module, "file": f"{library}/{path.as_posix()}"})
        if len(rows) >= count:
            break
    return rows[:count]


def drop_shared_(rows: dict[str, list[dict[str, str]]]) -> None:
    """Drop what occurs in two libraries, or nearly does: one beginning, and two answers."""

    def begin(row: dict[str, str]) -> str:
        return " ".join(list_words(row["text"])[:5])

    counts = Counter(start for own in rows.values() for start in {begin(row) for row in own})
    for own in rows.values():
        own[:] = [row for row in own if counts[begin(row)] == 1]


def split_rows(rows: list[dict[str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of one library with its split; a file's rows, which stand together, stay together."""
    starts: dict[str, int] = {}
    for number, row in enumerate(rows):
        position = starts.setdefault(row["file"], number) / len(rows)
        for split, share in SPLITS.items():
            position -= share
            if position < 0:
                break
        yield split, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--rows", type=int, default=4000, help="docstrings to read, over all libraries")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = {library: collect_rows(library, args.rows // len(LIBRARIES), args.seed) for library in LIBRARIES}
    drop_shared_(rows)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, row in (pair for library in LIBRARIES for pair in split_rows(rows[library])):
        team = f"team-{int(draw(args.seed, 'team', row['module']) * NUM_TEAMS) + 1}"
        line = {"text": row["text"], "label": LIBRARIES.index(row["label"]), "team": team}
        splits[split].append(json.dumps(line))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        lines.sort(key=lambda line: draw(args.seed, "order", line))
        (args.output_dir / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.output_dir / "labels.json").write_text(json.dumps(LIBRARIES) + "\n", encoding="utf-8")
    print(", ".join(f"{len(lines)} rows of {split}" for split, lines in splits.items()), "in", args.output_dir)


if __name__ == "__main__":
    main()
