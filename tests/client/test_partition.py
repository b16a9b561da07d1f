# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Every row belongs to exactly one client, and to the same one each time."""

import time

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, Subset, TensorDataset

from fedlpp_hf.client.partition import (
    check_client_sizes,
    count_rows,
    partition_clients,
    partition_dataset,
    partition_rows,
)
from fedlpp_hf.config.federated import FederatedConfig


labels = st.lists(st.sampled_from(["", "1", "1\0", "ä", "client-0", "two words"]), min_size=1, max_size=60)
seeds = st.integers(0, 2**32 - 1)


def check_rows(parts: dict[str, np.ndarray], num_rows: int) -> None:
    """Every row exactly once, in order within each client, and no client without rows."""
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(num_rows))
    for rows in parts.values():
        assert len(rows) and (np.diff(rows) > 0).all()


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


@settings(deadline=None, derandomize=True)
@given(num_rows=st.integers(1, 300), num_clients=st.integers(1, 40), seed=seeds)
def test_iid_clients_differ_by_at_most_one_row(num_rows, num_clients, seed):
    assume(num_clients <= num_rows)
    parts = partition_rows(None, num_rows, "iid", num_clients, 0.5, seed)
    check_rows(parts, num_rows)
    sizes = [len(rows) for rows in parts.values()]
    assert len(parts) == num_clients and max(sizes) - min(sizes) <= 1
    assert same(parts, partition_rows(None, num_rows, "iid", num_clients, 0.5, seed))


@settings(deadline=None, derandomize=True)
@given(column=labels, num_clients=st.integers(1, 5), alpha=st.sampled_from([0.1, 1.0, 100.0]), seed=seeds)
def test_dirichlet_gives_every_row_away_or_says_why_not(column, num_clients, alpha, seed):
    arguments = (column, len(column), "dirichlet", num_clients, alpha, seed)
    try:
        parts = partition_rows(*arguments)
    except ValueError as error:
        assert "clients for" in str(error) or "without rows" in str(error)
        assert num_clients > 1
        return
    check_rows(parts, len(column))
    assert len(parts) == num_clients
    assert same(parts, partition_rows(*arguments))


@settings(deadline=None, derandomize=True)
@given(column=labels)
def test_natural_clients_are_the_values_of_a_column(column):
    parts = partition_rows(column, len(column), "hospital", None, 0.5, 0)
    check_rows(parts, len(column))
    assert {name: {column[row] for row in rows} for name, rows in parts.items()} == {v: {v} for v in column}


def test_small_alpha_makes_clients_that_differ():
    column = [str(row % 4) for row in range(4000)]

    def spread(alpha: float) -> float:
        parts = partition_rows(column, 4000, "dirichlet", 5, alpha, 0)
        shares = [np.bincount([int(column[row]) for row in rows], minlength=4) / len(rows) for rows in parts.values()]
        return float(np.std(shares, axis=0).mean())

    assert spread(0.3) > 3 * spread(100.0)


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_another_seed_makes_another_partition(partition):
    column = ["a", "b"] * 50
    one, other = (partition_rows(column, 100, partition, 4, 10.0, seed) for seed in (0, 1))
    assert not same(one, other)


def test_names_of_clients_sort_as_their_numbers():
    names = list(partition_rows(None, 12, "iid", 12, 0.5, 0))
    assert names == sorted(names) and (names[0], names[-1]) == ("client-00", "client-11")


def test_more_clients_than_rows_are_refused():
    for partition in ("iid", "dirichlet"):
        with pytest.raises(ValueError, match="4 clients for 3 rows; every client needs at least one row"):
            partition_rows(["a"] * 3, 3, partition, 4, 0.5, 0)


def test_client_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"left \d+ of 20 clients without rows \(first: client-\d\d\)"):
        partition_rows(["a"] * 20, 20, "dirichlet", 20, 0.01, 0)


@pytest.fixture
def dataset() -> Dataset:
    return Dataset.from_dict(
        {"text": [f"row {row}" for row in range(9)], "label": [0, 1, 2] * 3, "site": [7, 7, 8] * 3}
    )


@pytest.mark.parametrize("partition, clients", [("iid", 3), ("dirichlet", 2), ("site", 2)])
def test_dataset_is_split_into_its_rows(dataset, partition, clients):
    parts = partition_dataset(dataset, partition, clients, 5.0, "label", 1)
    assert len(parts) == clients
    assert sorted(text for part in parts.values() for text in part["text"]) == sorted(dataset["text"])
    assert all(part.column_names == dataset.column_names for part in parts.values())


def test_natural_clients_of_a_dataset_have_their_values_as_names(dataset):
    parts = partition_dataset(dataset, "site", None, 0.5, "label", 0)
    assert {name: set(part["site"]) for name, part in parts.items()} == {"7": {7}, "8": {8}}


@pytest.mark.parametrize("partition, column, missing", [("hospital", "label", "hospital"), ("dirichlet", "y", "y")])
def test_unknown_column_is_refused_with_those_there_are(dataset, partition, column, missing):
    with pytest.raises(ValueError, match=f"needs the column `{missing}`; the dataset has text, label, site"):
        partition_dataset(dataset, partition, 2, 0.5, column, 0)


# --- What people pass as `train_dataset`.
ROWS = [{"input_ids": [row, row + 1], "site": "ab"[row % 2]} for row in range(6)]


class Rows(torch.utils.data.Dataset):
    """A torch dataset of [`ROWS`]."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def clients_of(train_dataset, tmp_path, **options):
    return partition_clients(train_dataset, FederatedConfig(str(tmp_path), use_cpu=True, **options))


@pytest.mark.parametrize(
    "data", [ROWS, tuple(ROWS), Rows(), Subset(Rows(), range(6)), Dataset.from_list(ROWS)], ids=type
)
@pytest.mark.parametrize("options", [{"num_clients": 3}, {"partition": "site"}], ids=str)
def test_rows_by_number_are_partitioned(data, options, tmp_path):
    clients = clients_of(data, tmp_path, **options)
    assert list(clients) == (["client-0", "client-1", "client-2"] if "num_clients" in options else ["a", "b"])
    rows = [rows[row] for rows in clients.values() for row in range(len(rows))]
    assert sorted(row["input_ids"][0] for row in rows) == list(range(6))
    if "partition" in options:
        assert {rows[0]["site"] for rows in clients.values()} == {"a", "b"}
    # By the same seed, whatever the rows are in.
    expected = clients_of(Dataset.from_list(ROWS), tmp_path, **options)
    for client, rows in clients.items():
        assert [rows[row]["input_ids"] for row in range(len(rows))] == list(expected[client]["input_ids"])


def test_natural_clients_take_time_in_proportion_to_the_rows():
    def measure(count):
        column = [f"client-{row % (count // 10)}" for row in range(count)]
        began = time.perf_counter()
        parts = partition_rows(column, count, "site", None, 0.5, 0)
        assert len(parts) == count // 10
        return time.perf_counter() - began

    assert min(measure(80_000) for _ in range(3)) < 1  # 6 s when each client went through all rows


@pytest.mark.parametrize("kind", [DatasetDict, IterableDatasetDict])
def test_splits_are_no_clients(kind, tmp_path):
    rows = Dataset.from_list(ROWS)
    splits = kind({"train": rows, "test": rows})
    with pytest.raises(
        ValueError, match=rf"`train_dataset`: a {kind.__name__} with the splits 'train', 'test'.*\['train'\]"
    ):
        clients_of(splits, tmp_path)
    with pytest.raises(ValueError, match="client 'a': a .* with the splits 'train', 'test'"):
        clients_of({"a": splits}, tmp_path)


@pytest.mark.parametrize(
    "names", [("train", "test"), ("train", "validation", "test"), ("TRAIN", "dev"), ("train", "eval")]
)
def test_a_plain_dict_of_splits_is_none_of_clients(names, tmp_path):
    """What `{name: split.map(...) for name, split in data.items()}` makes of a DatasetDict."""
    with pytest.raises(ValueError, match=rf"`train_dataset`: a dict with the splits .*\['{names[0]}'\]"):
        clients_of(dict.fromkeys(names, ROWS), tmp_path)
    # Clients may be called anything else.
    assert list(clients_of({"train": ROWS}, tmp_path)) == ["train"]
    assert list(clients_of({"train": ROWS, "tram": ROWS}, tmp_path)) == ["train", "tram"]
    assert list(clients_of({"test": ROWS, "dev": ROWS}, tmp_path)) == ["dev", "test"]


@pytest.mark.parametrize(
    "data, message",
    [
        ({"a": None}, "client 'a': of type NoneType; expected a Dataset, a list"),
        ({"a": "rows.jsonl"}, "client 'a': of type str"),
        ("rows.jsonl", "`train_dataset`: of type str"),
        (iter(ROWS), "`train_dataset`: of type list_iterator"),
        ({"a": {"input_ids": [1]}}, "client 'a': of type dict"),
        ({"input_ids": [[1]], "labels": [0]}, "the key 'input_ids', which is a column and no client"),
        (pd.DataFrame({"x": [1]}), "a pandas DataFrame was given.*Dataset.from_pandas"),
        ({"a": pd.DataFrame({"x": [1]})}, "client 'a': a pandas DataFrame"),
        ([Dataset.from_list(ROWS)] * 2, "`train_dataset`: a list of 2 datasets .*give a mapping"),
        ((Rows(), Rows()), "`train_dataset`: a tuple of 2 datasets"),
        ({"a": [Dataset.from_list(ROWS)]}, "client 'a': a list of 1 datasets .*concatenate_datasets"),
        (None, "`train_dataset` is missing"),
        ([], "8 clients for 0 rows"),
    ],
)
def test_what_can_not_be_trained_on_is_refused(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        clients_of(data, tmp_path)


@pytest.mark.parametrize(
    "stream", [Stream(), Dataset.from_list(ROWS).to_iterable_dataset()], ids=["torch", "datasets"]
)
def test_streams_are_clients_if_the_steps_are_known(stream, tmp_path):
    clients = clients_of({"a": stream, "b": Rows()}, tmp_path, max_steps=2)
    assert clients["a"] is stream and count_rows(clients) == {"a": None, "b": 6}
    check_client_sizes(clients, 4)
    with pytest.raises(ValueError, match="client 'a' come as a stream .*Set max_steps"):
        clients_of({"a": stream}, tmp_path)
    with pytest.raises(ValueError, match="a stream can't be partitioned.*mapping of client ids to streams"):
        clients_of(stream, tmp_path, max_steps=2)


def test_columns_of_rows_that_have_none(tmp_path):
    with pytest.raises(ValueError, match="are no mappings: one is a tuple.*partition='iid'"):
        clients_of(TensorDataset(torch.arange(6)), tmp_path, partition="site")
    with pytest.raises(ValueError, match="needs the column `hospital`; the dataset has input_ids, site"):
        clients_of(ROWS, tmp_path, partition="hospital")


# --- Client ids.
@pytest.mark.parametrize(
    "ids, names",
    [
        ([2, 10, 1], ["1", "10", "2"]),
        ([1, "b", None, ("x", 1)], ["('x', 1)", "1", "None", "b"]),
        (["a\0", "a"], ["a", "a\0"]),
        ([np.int64(3), 4.5], ["3", "4.5"]),
    ],
    ids=str,
)
def test_ids_are_text(ids, names, tmp_path):
    clients = clients_of({client: [ROWS[row]] for row, client in enumerate(ids)}, tmp_path)
    assert list(clients) == names
    assert all(clients[str(client)] == [ROWS[row]] for row, client in enumerate(ids))


@pytest.mark.parametrize("ids", [(1, "1"), (None, "None"), (True, "True")], ids=str)
def test_ids_that_are_the_same_as_text_are_refused(ids, tmp_path):
    with pytest.raises(ValueError, match=f"client ids .*{ids[0]!r}.*, which are the same as text"):
        clients_of(dict.fromkeys(ids, ROWS), tmp_path)
    with pytest.raises(ValueError, match=f"the value '{ids[1]}' as .* and as "):
        clients_of([{"site": client} for client in ids], tmp_path, partition="site")


def test_ids_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no valid text"):
        clients_of({"\ud800": ROWS}, tmp_path)


def test_values_of_a_formatted_column_are_clients_by_their_value():
    rows = Dataset.from_dict({"x": [1, 2, 3], "site": [7, 7, 8]}).with_format("torch")
    assert list(partition_dataset(rows, "site", None, 0.5, "label", 0)) == ["7", "8"]


def test_ids_that_differ_by_a_trailing_nul_stay_apart():
    parts = partition_rows(["a", "a\0", "b"], 3, "site", 1, 1, 0)
    assert {name: rows.tolist() for name, rows in parts.items()} == {"a": [0], "a\0": [1], "b": [2]}
