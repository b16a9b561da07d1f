# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""From one dataset to clients: which rows each client holds."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, Subset

from ..config.federated import FederatedConfig


# What a dataset given as its columns has for keys, and no client is called.
_COLUMNS = ("input_ids", "attention_mask", "labels", "pixel_values", "messages", "prompt")
_SPLITS = {"train", "validation", "valid", "val", "dev", "eval", "evaluation", "test"}


def group_rows(column: Iterable) -> dict[str, np.ndarray]:
    """Row indices by value of `column` as text, sorted, in time proportional to the rows.

    Raises:
        ValueError: if two values differ and have the same text, such as 1 and "1".
    """
    groups: dict[str, list[int]] = {}
    kinds: dict[str, type] = {}
    for row, value in enumerate(column):
        value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
        name = str(value)
        groups.setdefault(name, []).append(row)
        if kinds.setdefault(name, type(value)) is not type(value):
            raise ValueError(
                f"The column has the value {name!r} as {kinds[name].__name__} and as {type(value).__name__}; clients are "
                "told apart by its text. Make the column's values of one type."
            )
    return {name: np.asarray(groups[name], dtype=np.int64) for name in sorted(groups)}


def partition_rows(
    column: Sequence, num_rows: int, partition: str, num_clients: int, alpha: float, seed: int
) -> dict[str, np.ndarray]:
    """Row indices by client id.

    Args:
        column: Value of each row.
        num_rows: Number of rows.
        partition: `iid` (shuffled, sizes differ by at most one row), `dirichlet` (each value of `column` spread over the
            clients in proportions drawn from Dirichlet(`alpha`), Hsu et al., arXiv 1909.06335), or anything else for natural
            clients: one for each value of `column`.
        num_clients: For iid and dirichlet.
        alpha: Concentration of the Dirichlet distribution.
        seed: Of the draws.

    Raises:
        ValueError: if there are more clients than rows, a client ends up without rows, or two values have the same text.
    """
    if partition not in ("iid", "dirichlet"):
        return group_rows(column)
    if num_clients > num_rows:
        raise ValueError(
            f"{num_clients} clients for {num_rows} rows; every client needs at least one row. Lower num_clients."
        )
    names = [f"client-{number:0{len(str(num_clients - 1))}d}" for number in range(num_clients)]
    generator = np.random.default_rng(seed)
    if partition == "iid":
        parts = np.array_split(generator.permutation(num_rows), num_clients)
        return {name: np.sort(part) for name, part in zip(names, parts, strict=True)}
    owners = np.empty(num_rows, dtype=np.int64)
    for group in group_rows(column).values():
        rows = generator.permutation(group)
        shares = generator.dirichlet(np.full(num_clients, alpha))
        bounds = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for client, part in enumerate(np.split(rows, bounds)):
            owners[part] = client
    order = np.argsort(owners, kind="stable")
    parts = np.split(order, np.searchsorted(owners[order], np.arange(1, num_clients)))
    if empty := [name for name, part in zip(names, parts, strict=True) if not len(part)]:
        raise ValueError(
            f"The Dirichlet partition left {len(empty)} of {num_clients} clients without rows (first: {empty[0]}). "
            "Use fewer clients, a larger dirichlet_alpha, more rows, or another seed."
        )
    return dict(zip(names, parts, strict=True))


def partition_dataset(dataset, partition: str, num_clients: int, alpha: float, column: str, seed: int) -> dict:
    """Each client's part of a dataset, as views by index into it.

    Args:
        dataset: A `datasets.Dataset`, or anything with a length and rows by number: a list, a torch dataset, a subset.
        partition: `iid`, `dirichlet`, or the column of natural clients.
        num_clients: As in [`partition_rows`].
        alpha: As in [`partition_rows`].
        column: That `dirichlet` spreads.
        seed: As in [`partition_rows`].

    Raises:
        ValueError: for an unknown column, or as [`partition_rows`].
    """
    values: Sequence = ()
    if partition != "iid":
        values = read_column(dataset, column if partition == "dirichlet" else partition, partition)
    rows = partition_rows(values, len(dataset), partition, num_clients, alpha, seed)
    if _is_table(dataset):
        return {client: dataset.select(indices) for client, indices in rows.items()}
    return {client: Subset(dataset, indices.tolist()) for client, indices in rows.items()}


def read_column(dataset: Any, column: str, partition: str) -> Sequence:
    """The values of one column of all rows.

    Raises:
        ValueError: if there is no such column; names those there are.
    """
    if _is_table(dataset):
        if column in dataset.column_names:
            return dataset[column][:]
        names = dataset.column_names
    else:
        rows = [dataset[row] for row in range(len(dataset))]
        if all(isinstance(row, Mapping) and column in row for row in rows):
            return [row[column] for row in rows]
        poor = next(row for row in rows if not (isinstance(row, Mapping) and column in row))
        if not isinstance(poor, Mapping):
            raise ValueError(
                f"partition={partition!r} needs the column `{column}`, and the rows of this {type(dataset).__name__} are "
                f"no mappings: one is a {type(poor).__name__}. Use partition='iid', or give a mapping of client ids to "
                "datasets."
            )
        names = poor.keys()
    raise ValueError(f"partition={partition!r} needs the column `{column}`; the dataset has {', '.join(names)}.")


def partition_clients(train_dataset: Any, args: FederatedConfig) -> dict[str, Any]:
    """The clients' datasets by id, sorted: those of a mapping, or `train_dataset` partitioned as `args` say.

    Raises:
        ValueError: if there is nothing, if it is of no kind that can be trained on, or as [`partition_dataset`].
    """
    if train_dataset is None:
        raise ValueError("`train_dataset` is missing: a Dataset, or a mapping of client ids to datasets.")
    if isinstance(train_dataset, Mapping):
        check_splits(train_dataset, "`train_dataset`")
        if columns := [name for name in _COLUMNS if name in train_dataset]:
            raise ValueError(
                f"`train_dataset` is of type {type(train_dataset).__name__}, with the key {columns[0]!r}, which is a column and no "
                "client. Make one dataset of it by Dataset.from_dict(...), or give a mapping of client ids to datasets."
            )
        clients = name_clients(train_dataset)
        for client, rows in clients.items():
            check_rows(rows, f"The rows of client {client!r}", args)
        return clients
    if is_stream(train_dataset):
        raise ValueError(
            f"`train_dataset` is of type {type(train_dataset).__name__}: a stream can't be partitioned, as its rows have no "
            "numbers. Give a mapping of client ids to streams, with max_steps, or a dataset with a length."
        )
    check_rows(train_dataset, "`train_dataset`", args)
    clients = name_clients(
        partition_dataset(
            train_dataset,
            args.partition,
            args.num_clients or 1,
            args.dirichlet_alpha,
            args.dirichlet_column,
            args.seed,
        )
    )
    if not clients:
        raise ValueError("There are no clients: `train_dataset` is empty.")
    return clients


def drop_column(datasets: Mapping[str, Any], column: str) -> dict[str, Any]:
    """The clients' tables without `column`: trainers of sentence-transformers take every column for one more text."""
    return {
        client: rows.remove_columns(column) if _is_table(rows) and column in rows.column_names else rows
        for client, rows in datasets.items()
    }


def name_clients(datasets: Mapping[Hashable, Any]) -> dict[str, Any]:
    """Datasets by the text of their client's id, sorted.

    Raises:
        ValueError: if two ids have the same text, or one is no valid text.
    """
    named: dict[str, Any] = {}
    for client in sorted(datasets, key=str):
        name = str(client)
        if name in named:
            same = [repr(other) for other in datasets if str(other) == name]
            raise ValueError(
                f"`train_dataset` has the client ids {' and '.join(same)}, which are the same as text; ids are compared as "
                "text. Rename one of them."
            )
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The client id {name!r} is no valid text ({error.reason}). Rename that client."
            ) from None
        named[name] = datasets[client]
    return named


def check_splits(data: Any, what: str) -> None:
    """Refuse a `DatasetDict`, or a dict of what it holds: its splits are no clients.

    Raises:
        ValueError: naming `what` and the splits.
    """
    names = [str(name).lower() for name in data] if isinstance(data, Mapping) else []
    is_split = any(kind.__name__ in ("DatasetDict", "IterableDatasetDict") for kind in type(data).__mro__)
    if is_split or ("train" in names and len(names) > 1 and _SPLITS.issuperset(names)):
        splits = [repr(split) for split in data]
        best = splits[names.index("train")] if "train" in names else (splits or ["'train'"])[0]
        raise ValueError(
            f"{what}: a {type(data).__name__} with the splits {', '.join(splits)} was given, and a split is no client. "
            f"Pass one split, such as data[{best}]; a mapping of client ids to datasets must be a plain dict whose ids are "
            "not the names of splits."
        )


def check_rows(rows: Any, what: str, args: FederatedConfig) -> None:
    """Refuse what a Trainer can't train on: neither rows by number, nor a stream with `max_steps`.

    Raises:
        ValueError: naming `what`, its type, and what to give instead.
    """
    check_splits(rows, what)
    kind = type(rows).__name__
    if hasattr(rows, "to_parquet") and hasattr(rows, "iloc"):
        raise ValueError(f"{what}: a pandas {kind} was given; expected a Dataset. Use Dataset.from_pandas(...).")
    if is_stream(rows):
        if args.max_steps <= 0:
            raise ValueError(f"{what} come as a stream ({kind}), and a local run must know its steps. Set max_steps.")
        return
    if isinstance(rows, str | bytes | Mapping) or not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
        raise ValueError(
            f"{what}: of type {kind}; expected a Dataset, a list of rows, a torch dataset with a length, or an "
            "IterableDataset with max_steps."
        )
    if isinstance(rows, list | tuple) and rows and (_is_table(rows[0]) or isinstance(rows[0], TorchDataset)):
        raise ValueError(
            f"{what}: a {kind} of {len(rows)} datasets was given, and expected are rows. If each is a client, give a mapping, such "
            "as {f'client-{n}': rows for n, rows in enumerate(datasets)}; else join them by concatenate_datasets(...)."
        )


def is_stream(rows: Any) -> bool:
    """Whether rows come one after the other and not by number."""
    return isinstance(rows, IterableDataset) or (hasattr(rows, "__iter__") and hasattr(rows, "set_epoch"))


def count_rows(datasets: Mapping[str, Any]) -> dict[str, int | None]:
    """Each client's number of rows; None for a stream."""
    return {client: None if is_stream(rows) else len(rows) for client, rows in datasets.items()}


def check_client_sizes(datasets: Mapping[str, Any], smallest: int) -> None:
    """Refuse clients with fewer rows than a run needs.

    Raises:
        ValueError: naming the first one.
    """
    for client, count in count_rows(datasets).items():
        if count is not None and count < smallest:
            raise ValueError(
                f"Client {client!r} has {count} rows; at least {smallest} are needed. Drop that client, or set "
                "dataloader_drop_last=False to train on less than a full batch."
            )


def _is_table(dataset: Any) -> bool:
    """Whether it is a `datasets.Dataset`, which this folder does not import."""
    return hasattr(dataset, "select") and hasattr(dataset, "column_names")
