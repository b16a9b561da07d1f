# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The owner's rows for a simulation: read, encoded, and split into clients and three parts that no client has."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase


# The kinds of rows by the columns that they have, the surest first.
KINDS = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
_FILES = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
# Share of all rows and most rows of what no client has: what results are measured on, what chooses, the owner's own.
_PARTS = {"test": (0.2, 512), "selection": (0.08, 128), "owner": (0.12, 400)}
CLIENT_GROUP = "client_group"  # the column by which rows are divided among clients, whatever its name is in the data
SMALLEST_PART = 16  # rows: fewer choose and measure next to nothing


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where rows come from and which of their columns count.

    Args:
        data: A file, a directory of `Dataset.save_to_disk`, or a name on the Hub.
        split: Of a dataset with several.
        config: Of a dataset on the Hub.
        columns: Names of the columns in the data by what they are to us: `text`, `label`, `prompt`, `completion`, `messages`.
        separator: Between prompt and completion.
        max_length: Tokens of a row; more are cut off.
        most: Rows to use, drawn at random.
    """

    data: str
    split: str
    config: str | None
    columns: Mapping[str, str]
    separator: str
    max_length: int
    most: int


@dataclass(frozen=True, slots=True)
class AdviceRows:
    """Encoded rows by part: `clients`, `test`, `selection`, `owner`; `kind` is one of `KINDS`; `digest` tells rows apart."""

    kind: str
    parts: Mapping[str, Dataset]
    dropped: int

    @property
    def digest(self) -> str:
        """SHA-256 of all rows in their parts."""
        found = hashlib.sha256()
        for name, rows in self.parts.items():
            found.update(name.encode())
            for row in rows:
                found.update(json.dumps(row, sort_keys=True, default=str).encode())
        return found.hexdigest()


def read_rows(source: RowSource) -> Dataset:
    """The rows as they are.

    Raises:
        ValueError: if there are none under that name, or the split is missing.
    """
    path = Path(source.data)
    kind = _FILES.get(path.suffix.removeprefix("."))
    try:
        if kind is not None:
            return load_dataset(kind, data_files=source.data, split="train")
        rows = load_from_disk(source.data) if path.is_dir() else load_dataset(source.data, source.config)
    except Exception as error:  # of pyarrow, pandas, fsspec, the Hub
        raise ValueError(
            f"`{source.data}` can't be read as rows ({type(error).__name__}: {error}); expected a .jsonl, .json, .csv or "
            ".parquet file, a directory written by save_to_disk, or a dataset on the Hub."
        ) from error
    if isinstance(rows, Dataset):
        return rows
    if source.split not in rows:
        raise ValueError(f"`{source.data}` has no split `{source.split}`; expected one of {', '.join(rows)}.")
    return DatasetDict(rows)[source.split]


def find_kind(names: list[str], columns: Mapping[str, str]) -> str:
    """Which of `KINDS` rows with the columns `names` are.

    Raises:
        ValueError: if a column that was named is missing, or they are of no kind.
    """
    for role, name in columns.items():
        if name not in names:
            raise ValueError(f"{role}_column={name!r}, but the rows have the columns {', '.join(names)}.")
    wanted = [kind for kind, roles in KINDS.items() if columns and set(columns) <= set(roles)]
    for kind in wanted or ([] if columns else list(KINDS)):
        if all(columns.get(role, role) in names for role in KINDS[kind]):
            return kind
    expected = "; ".join(" and ".join(f"`{role}`" for role in roles) for roles in KINDS.values())
    raise ValueError(
        f"The rows have the columns {', '.join(names)}; expected {expected}. Say which column is which with "
        "`text_column`, `label_column`, `prompt_column`, `completion_column` or `messages_column`."
    )


def prepare_rows(source: RowSource, full_model: str, group: str | None, num_clients: int, seed: int) -> AdviceRows:
    """Read, encode and split the owner's rows.

    Args:
        source: Of the rows.
        full_model: Whose tokenizer and labels they get.
        group: Column to keep, by which rows are divided among clients.
        num_clients: Each needs rows.
        seed: Of the draw and the split.

    Raises:
        ValueError: for unknown columns, classes that the model does not have, or too few rows.
    """
    rows = read_rows(source)
    kind = find_kind(rows.column_names, source.columns)
    if group is not None and group not in rows.column_names:
        raise ValueError(
            f"Clients by the column `{group}`, but the rows have {', '.join(rows.column_names)}. Set partition, or "
            "dirichlet_column."
        )
    names = {role: source.columns.get(role, role) for role in KINDS[kind]}
    for role, name in names.items():
        if role in ("text", "prompt", "completion"):
            _check_texts(rows[name], name)
    rows = rows.shuffle(seed=seed).take(min(source.most, len(rows)))
    encode = _make_encoder(kind, names, source, full_model)
    # A column that the model would take for its own, such as `label`, goes on under a name of its own.
    keep = {} if group is None else {CLIENT_GROUP: [str(value) for value in rows[group]]}
    encoded = rows.map(encode, remove_columns=rows.column_names, desc="Tokenizing")
    for name, values in keep.items():
        encoded = encoded.add_column(name, values)
    labels = "label" if kind == "classification" else "labels"
    kept = encoded if labels == "label" else encoded.filter(lambda row: any(label != -100 for label in row["labels"]))
    return AdviceRows(kind, _split(kept, num_clients), len(encoded) - len(kept))


def _check_texts(values: Iterable[Any], column: str) -> None:
    for place, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(
                f"Row {place} has {str(value)[:50]!r} in the column `{column}`, of type {type(value).__name__}; expected text. Give "
                "conversations as `messages`, and drop rows without a text."
            )


def _split(rows: Dataset, num_clients: int) -> dict[str, Dataset]:
    """Rows, which are in a random order already, by part."""
    counts = {name: min(int(share * len(rows)), most) for name, (share, most) in _PARTS.items()}
    left = len(rows) - sum(counts.values())
    if min(counts.values()) < SMALLEST_PART or left < SMALLEST_PART * num_clients:
        least = max(SMALLEST_PART / min(share for share, _ in _PARTS.values()), SMALLEST_PART * num_clients / 0.6)
        raise ValueError(
            f"There are {len(rows)} rows; {num_clients} clients, and rows that none of them has to choose by and to measure on, "
            f"need {int(least) + 1}. Give more rows, or fewer clients (num_clients)."
        )
    parts, start = {}, 0
    for name, count in counts.items():
        parts[name] = rows.select(range(start, start + count))
        start += count
    return {"clients": rows.select(range(start, len(rows))), **parts}


def _make_encoder(kind: str, names: Mapping[str, str], source: RowSource, full_model: str) -> Callable:
    tokenizer = AutoTokenizer.from_pretrained(full_model)
    if kind == "classification":
        label2id = AutoConfig.from_pretrained(full_model).label2id or {}

        def classify(row: dict[str, Any]) -> dict[str, Any]:
            label = row[names["label"]]
            label = label2id.get(label, label) if isinstance(label, str) else label
            if label not in label2id.values():
                raise ValueError(
                    f"A row has the class {label!r}, and the model a head for {', '.join(map(str, label2id))}. Give the full "
                    "model a head for this task first, as recipes/owner_warmup.py does."
                )
            encoded = tokenizer(row[names["text"]], truncation=True, max_length=source.max_length)
            return {**encoded, "label": label}

        return classify
    if kind == "messages" and not tokenizer.chat_template:
        raise ValueError(
            f"`{full_model}` has no chat template, and the rows are messages. Use prompts and completions."
        )

    def learn(row: dict[str, Any]) -> dict[str, Any]:
        start, answer = _encode_text(kind, row, names, source.separator, tokenizer)
        ids, labels = start + answer, [-100] * len(start) + answer
        return {"input_ids": ids[: source.max_length], "labels": labels[: source.max_length]}

    return learn


def _encode_text(
    kind: str, row: Mapping[str, Any], names: Mapping[str, str], separator: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids of what is given and of what is to be learned; apart, so that no token reaches over the border."""
    if kind == "messages":
        messages = row[names["messages"]]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        start = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        shared = len(start) if whole.startswith(start) else 0
        first = tokenizer(whole[:shared], add_special_tokens=False)["input_ids"] if shared else []
        return first, tokenizer(whole[shared:], add_special_tokens=False)["input_ids"]
    ids = tokenizer(row[names["text" if kind == "text" else "completion"]], add_special_tokens=False)["input_ids"]
    answer = ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
    if kind == "text":
        return [tokenizer.bos_token_id] * bool(tokenizer.bos_token), answer
    return tokenizer(row[names["prompt"]] + separator)["input_ids"], answer
