# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Small real datasets for the text recipes, made of the docstrings of installed libraries; nothing is downloaded.

    python recipes/data/docstring_tasks.py out/tasks

writes `train.jsonl`, `test.jsonl` and `owner.jsonl` into a folder per task. A row's `team` is its natural client: a team
maintains a few submodules of several libraries. A docstring's first sentence is its `summary`, the prose below its body.

| folder | columns | for |
|---|---|---|
| `chats` | `messages`: asked for a summary of the body, the assistant gives it | sft.py |
| `preferences` | `prompt`, `chosen` (the summary), `rejected` (its words in another order) | dpo.py, reward.py |
| `prompts` | `prompt`, `reference` (the summary) | grpo.py |
| `summaries` | `document` (the body), `summary` | seq2seq.py |
| `pairs` | `anchor` (the summary), `positive` (the body) | sentence_embeddings.py |
| `tokens` | `tokens`, `ner_tags`: which words of the prose the authors marked as code | token_classification.py |
"""

import argparse
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

from docstrings import LIBRARIES, draw, find_source, list_files, read_docstrings


SPLITS = {"owner": 0.1, "test": 0.2, "train": 0.7}
NUM_TEAMS = 3
MAX_PER_FILE = 4
SUMMARY_WORDS, BODY_WORDS = (4, 16), (12, 40)  # shorter rows are dropped; longer bodies are cut at a word
CODE = re.compile(r"``([^`]+)``|:\w+:`([^`]+)`|`([^`]+)`")
NO_PROSE = re.compile(r">>>|^\s*(?:[-=~.*:]|\w+:$|\w+ : )|\n[-=~]{3}", re.MULTILINE)


def list_paragraphs(docstring: str) -> list[str]:
    """The prose of a docstring up to its first section, each paragraph on one line."""
    paragraphs = []
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        if NO_PROSE.search(paragraph):
            break
        paragraphs.append(" ".join(paragraph.split()))
    return paragraphs


def split_summary(paragraphs: list[str]) -> tuple[str, str] | None:
    """Summary and body, if both are there and long enough."""
    summary, body = (
        CODE.sub(lambda m: m[1] or m[2] or m[3], text) for text in (paragraphs[0], " ".join(paragraphs[1:]))
    )
    body = " ".join(body.split()[: BODY_WORDS[1]])
    fits = SUMMARY_WORDS[0] <= len(summary.split()) <= SUMMARY_WORDS[1] and len(body.split()) >= BODY_WORDS[0]
    return (summary, body) if fits else None


def tag_code(text: str) -> dict[str, list[str]] | None:
    """The words of a text without its markup, and a tag for each: B-CODE, I-CODE or O."""
    tokens: list[str] = []
    tags: list[str] = []
    end = 0
    for match in [*CODE.finditer(text), None]:
        prose = text[end : match.start() if match else None].split()
        code = (match[1] or match[2] or match[3]).lstrip("~").split() if match else []
        tokens += prose + code
        tags += ["O"] * len(prose) + ["B-CODE", "I-CODE"][: len(code)] + ["I-CODE"] * (len(code) - 2)
        end = match.end() if match else end
    tokens, tags = tokens[: BODY_WORDS[1]], tags[: BODY_WORDS[1]]
    return {"tokens": tokens, "ner_tags": tags} if "B-CODE" in tags and len(tokens) >= BODY_WORDS[0] else None


def shuffle_words(text: str, seed: int) -> str:
    """The words of a text in another order, which small models can tell from the right one."""
    words = text.split()
    order = sorted(range(len(words)), key=lambda place: draw(seed, "words", text, place))
    if [words[place] for place in order] == words:
        order.reverse()
    return " ".join(words[place] for place in order)


def collect(library: str, seed: int) -> Iterator[tuple[str, list[str]]]:
    """A library's docstrings as (module, paragraphs), from files in an order drawn by `seed`."""
    root = find_source(library)
    for path in list_files(root, seed):
        found = [list_paragraphs(docstring) for docstring in read_docstrings(root / path)]
        for paragraphs in [paragraphs for paragraphs in found if paragraphs][:MAX_PER_FILE]:
            yield ".".join([library, *path.with_suffix("").parts[:2]]), paragraphs


def make_tasks(count: int, seed: int) -> dict[str, list[dict]]:
    """`count` rows for each task."""
    summaries: list[dict] = []
    tagged: list[dict] = []
    for library in LIBRARIES:
        room = count // len(LIBRARIES)
        here: list[dict] = []
        tags: list[dict] = []
        for module, paragraphs in collect(library, seed):
            team = f"team-{int(draw(seed, 'team', module) * NUM_TEAMS) + 1}"
            if (found := split_summary(paragraphs)) and len(here) < room:
                here.append({"summary": found[0], "body": found[1], "team": team})
            if (words := tag_code(" ".join(paragraphs))) and len(tags) < room:
                tags.append({**words, "team": team})
            if min(len(here), len(tags)) == room:
                break
        summaries += here
        tagged += tags

    def say(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    tasks: dict[str, list[dict]] = {"tokens": tagged}
    for row in summaries:
        team, summary = {"team": row["team"]}, row["summary"]
        ask = say("user", f"Summarize in one sentence: {row['body']}")
        answer, wrong = say("assistant", summary), say("assistant", shuffle_words(summary, seed))
        rows = {
            "chats": {"messages": [ask, answer]},
            "preferences": {"prompt": [ask], "chosen": [answer], "rejected": [wrong]},
            "prompts": {"prompt": [ask], "reference": summary},
            "summaries": {"document": row["body"], "summary": summary},
            "pairs": {"anchor": summary, "positive": row["body"]},
        }
        for task, columns in rows.items():
            tasks.setdefault(task, []).append({**columns, **team})
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--rows", type=int, default=600, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    for task, rows in make_tasks(args.rows, args.seed).items():
        rows.sort(key=lambda row: draw(args.seed, "order", json.dumps(row)))
        folder = args.output_dir / task
        folder.mkdir(parents=True, exist_ok=True)
        end = 0.0
        for split, share in SPLITS.items():
            start, end = end, end + share
            part = rows[round(start * len(rows)) : round(end * len(rows))]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
            print(f"{folder}/{split}.jsonl: {len(part)} rows")


if __name__ == "__main__":
    main()
