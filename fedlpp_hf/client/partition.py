# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""From one dataset to clients: which rows each client holds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..config.federated import FederatedConfig


def partition_rows(
    column: Sequence, num_rows: int, partition: str, num_clients: int, alpha: float, seed: int
) -> dict[str, np.ndarray]:
    """Row indices by client id.

    `partition` is `iid` (shuffled, sizes differ by at most one row), `dirichlet` (each value of `column` spread over the
    clients in proportions drawn from Dirichlet(`alpha`), Hsu et al., arXiv 1909.06335), or anything else for natural
    clients: one per value of `column`.

    Raises:
        ValueError: if there are more clients than rows, or a client ends up without rows.
    """
    if partition not in ("iid", "dirichlet"):
        values = np.asarray([str(value) for value in column])
        return {str(value): np.flatnonzero(values == value) for value in np.unique(values)}
    if num_clients > num_rows:
        raise ValueError(f"{num_clients} clients for {num_rows} rows; every client needs at least one row.")
    names = [f"client-{number:0{len(str(num_clients - 1))}d}" for number in range(num_clients)]
    generator = np.random.default_rng(seed)
    if partition == "iid":
        parts = np.array_split(generator.permutation(num_rows), num_clients)
        return {name: np.sort(part) for name, part in zip(names, parts, strict=True)}
    owners = np.empty(num_rows, dtype=np.int64)
    values = np.asarray([str(value) for value in column])
    for value in np.unique(values):
        rows = generator.permutation(np.flatnonzero(values == value))
        shares = generator.dirichlet(np.full(num_clients, alpha))
        bounds = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for client, part in enumerate(np.split(rows, bounds)):
            owners[part] = client
    parts = [np.flatnonzero(owners == client) for client in range(num_clients)]
    if empty := [name for name, part in zip(names, parts, strict=True) if not len(part)]:
        raise ValueError(
            f"The Dirichlet partition left {len(empty)} of {num_clients} clients without rows (first: {empty[0]}). "
            "Use fewer clients, a larger dirichlet_alpha, more rows, or another seed."
        )
    return dict(zip(names, parts, strict=True))


def partition_dataset(dataset, partition: str, num_clients: int, alpha: float, column: str, seed: int) -> dict:
    """A `datasets.Dataset` for each client, as views by index into one dataset; arguments as in [`partition_rows`].

    `column` is the one that `dirichlet` spreads; any other `partition` than iid and dirichlet is itself a column.

    Raises:
        ValueError: for an unknown column, or as [`partition_rows`].
    """
    values: Sequence = ()
    if partition != "iid":
        column = column if partition == "dirichlet" else partition
        if column not in dataset.column_names:
            raise ValueError(
                f"partition={partition!r} needs the column `{column}`; the dataset has {', '.join(dataset.column_names)}."
            )
        values = dataset[column]
    rows = partition_rows(values, len(dataset), partition, num_clients, alpha, seed)
    return {client: dataset.select(indices) for client, indices in rows.items()}


def partition_clients(train_dataset: Any, args: FederatedConfig) -> dict[str, Any]:
    """The clients' datasets by id, sorted: those of a mapping, or `train_dataset` partitioned as `args` say.

    Raises:
        ValueError: if there is nothing, or as [`partition_dataset`].
    """
    if isinstance(train_dataset, Mapping):
        return {str(client): rows for client, rows in sorted(train_dataset.items())}
    if train_dataset is None:
        raise ValueError("`train_dataset` is missing: a Dataset, or a mapping of client ids to datasets.")
    clients = partition_dataset(
        train_dataset, args.partition, args.num_clients or 1, args.dirichlet_alpha, args.dirichlet_column, args.seed
    )
    if not clients:
        raise ValueError("There are no clients: `train_dataset` is empty.")
    return clients


def check_client_sizes(datasets: Mapping[str, Any], smallest: int) -> None:
    """Refuse clients with fewer rows than a run needs.

    Raises:
        ValueError: naming the first one.
    """
    for client, rows in datasets.items():
        if len(rows) < smallest:
            raise ValueError(
                f"Client {client!r} has {len(rows)} rows; at least {smallest} are needed. Drop that client, or set "
                "dataloader_drop_last=False to train on less than a full batch."
            )
