# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients' rows, made ready to train on as the trainer itself does it, whatever its methods take."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import Trainer


_Parent: Any = Trainer if TYPE_CHECKING else object

_METHODS = (
    "_prepare_dataset",
    "_precompute_ref_logps",
    "preprocess_dataset",
)  # of TRL, of TRL, of sentence-transformers
_CLIENT = "_client_number"  # a column that goes through a constructor beside the rows


class RowsMixin(_Parent):
    """The part of [`FederatedMixin`] that prepares rows.

    The parent's constructor prepares the rows of one client. The methods it calls for this are noted with their
    arguments, and called again for every other client. A constructor that prepares rows without such a method is
    given the rows of all clients at once, with a column for the client.
    """

    train_dataset: Any
    _calls: list[tuple[Callable[..., Any], dict[str, Any], str]] | None = None  # None: nothing is noted
    _given: Any = None  # the rows that the constructor got
    _prepared: Any = None  # what has become of them so far

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        return self._note(super()._prepare_dataset, args, kwargs)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        return self._note(super()._precompute_ref_logps, args, kwargs)

    def preprocess_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """Of sentence-transformers' trainers."""
        return self._note(super().preprocess_dataset, args, kwargs)

    def rows_for_constructor(self, datasets: Mapping[str, Any], eval_dataset: Any) -> Any:
        """What the parent's constructor gets as `train_dataset`; it may be None."""
        self._calls = []
        rows = list(datasets.values()) or (
            [*eval_dataset.values()] if isinstance(eval_dataset, dict) else [eval_dataset]
        )
        if len(datasets) > 1 and self._prepares_inline() and all(isinstance(part, Dataset) for part in rows):
            columns = [part.add_column(_CLIENT, [number] * len(part)) for number, part in enumerate(rows)]
            rows = [concatenate_datasets(columns)]
        self._given = self._prepared = rows[0]
        return self._given

    def prepare_clients(self, datasets: Mapping[str, Any]) -> dict[str, Any]:
        """What each client trains on. Called once, after the parent's constructor.

        Raises:
            ValueError: if the constructor prepared rows in a way that can't be repeated.
        """
        together = isinstance(self._given, Dataset) and _CLIENT in self._given.column_names
        if self.train_dataset is not self._prepared:
            if together and _CLIENT in getattr(self.train_dataset, "column_names", ()):
                numbers = np.asarray(self.train_dataset[_CLIENT])
                rows = self.train_dataset.remove_columns(_CLIENT)
                datasets = {
                    client: rows.select(np.flatnonzero(numbers == number)) for number, client in enumerate(datasets)
                }
            elif len(datasets) == 1:
                datasets = dict.fromkeys(datasets, self.train_dataset)
            else:
                raise ValueError(
                    f"{type(self).__name__}'s constructor makes other rows of `train_dataset`, by no method that could be "
                    "called for each client. Prepare the rows first, and pass the result as `train_dataset`."
                )
            self._calls = []
        prepared = {client: self.prepare_client_dataset(rows, client) for client, rows in datasets.items()}
        self._calls = None
        if together:
            self.train_dataset = next(iter(prepared.values()))
        return prepared

    def prepare_client_dataset(self, dataset: Any, client_id: str) -> Any:
        """What a client trains on, from the rows it was given. TRL's trainers tokenize here."""
        if dataset is self._given:
            return self._prepared
        for method, arguments, name in self._calls or ():
            dataset = method(**arguments | {name: dataset})
        return dataset

    def _note(self, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        result = method(*args, **kwargs)
        if self._calls is not None:
            arguments = dict(inspect.signature(method).bind(*args, **kwargs).arguments)
            name = next((name for name, value in arguments.items() if value is self._prepared), None)
            if name is not None and self._prepared is not None:
                self._calls.append((method, arguments, name))
                self._prepared = result
        return result

    def _prepares_inline(self) -> bool:
        """Whether a parent with a constructor, which is no Trainer of transformers, has none of the known methods."""
        parents = type(self).__mro__
        parents = parents[parents.index(RowsMixin) + 1 :]
        return not any(hasattr(parent, method) for parent in parents for method in _METHODS) and any(
            "__init__" in vars(parent)
            and issubclass(parent, Trainer)
            and not parent.__module__.startswith("transformers.")
            for parent in parents
        )
