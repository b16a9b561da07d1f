# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Every row belongs to exactly one client, and to the same one each time."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedlpp_hf.client.partition import partition_dataset, partition_rows


labels = st.lists(st.sampled_from(["", "1", "ä", "client-0", "two words"]), min_size=1, max_size=60)
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
