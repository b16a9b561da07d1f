# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The inputs of an adapter's layers for given tokens, from a model that the attacker has: the base with the proxy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..tensors.lora import PREFIX


_FILLER = 3  # tokens of the sequences by which layers are told apart; any will do


class _Seen(Exception):
    """All layers that were asked for have been called."""


class InputReader:
    """Reads the inputs of the adapter's target layers, in the order in which the model calls them.

    `groups` are the names of layers with equal inputs (query, key and value of one attention), in that order. The inputs of the
    first group are a function of the token and, with `positional`, of its place; those of the others of what stands before them,
    too (and, in an encoder, after them).

    Raises:
        ValueError: if the model takes no tokens, or none of the targets sees one token alone.
    """

    def __init__(self, model: torch.nn.Module, targets: Sequence[str]):
        modules = dict(model.named_modules())
        self.model = model
        self.layers = {name: modules[PREFIX + name] for name in targets if PREFIX + name in modules}
        self.vocabulary = count_tokens(model)
        self.groups = self._find_groups()
        first = self.groups[0]
        one, other = self.read(torch.tensor([[3, 5, 4], [4, 5, 6]]), first[:1])[first[0]]
        if not torch.allclose(one[1], other[1], rtol=1e-4, atol=1e-5):
            raise ValueError(
                f"No target layer sees a token alone: the input of `{first[0]}`, the first, depends on the tokens beside it. "
                "Span tests need an adapter on the first block's query, key or value."
            )
        again = self.read(torch.full((1, 3), _FILLER), first[:1])[first[0]][0]
        self.positional = not torch.allclose(again[0], again[2], rtol=1e-4, atol=1e-5)
        self.causal = self._is_causal()

    def _find_groups(self) -> list[list[str]]:
        ids = torch.arange(_FILLER, _FILLER + 3).remainder(self.vocabulary)[None]
        inputs = self.read(ids, list(self.layers))
        groups: list[list[str]] = []
        for name, values in inputs.items():
            before = inputs[groups[-1][0]] if groups else None
            if before is not None and before.shape == values.shape and torch.equal(before, values):
                groups[-1].append(name)
            else:
                groups.append([name])
        if not groups:
            raise ValueError("The model calls none of the adapter's layers when it is given `input_ids`.")
        return groups

    def _is_causal(self) -> bool:
        """Whether what follows a token leaves its inputs alone in every layer."""
        last = self.groups[-1][:1]
        one, other = self.read(torch.tensor([[3, 4, 5], [3, 4, 6]]).remainder(self.vocabulary), last)[last[0]]
        return bool(torch.allclose(one[:2], other[:2], rtol=1e-4, atol=1e-5))

    @torch.no_grad()
    def read(
        self, ids: torch.Tensor, names: Sequence[str], mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The inputs `(rows, length, in)` of the layers `names`, by name, for tokens `(rows, length)`.

        The model runs without dropout, and no further than it must.
        """
        found: dict[str, torch.Tensor] = {}
        device = next(self.model.parameters()).device
        arguments = {"input_ids": ids.to(device)} | ({} if mask is None else {"attention_mask": mask.to(device)})
        with _evaluating(self.model), self._hooks(names, found), suppress(_Seen):
            self.model(**arguments)
        return found

    @contextmanager
    def _hooks(self, names: Sequence[str], found: dict[str, torch.Tensor]) -> Iterator[None]:
        def make(name: str):
            def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
                found[name] = inputs[0].detach().float().cpu()
                if len(found) == len(names):
                    raise _Seen

            return hook

        handles = [self.layers[name].register_forward_pre_hook(make(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def count_tokens(model: Any) -> int:
    """The rows of the model's embedding."""
    return int(model.get_input_embeddings().num_embeddings)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def split_batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` of `count` things."""
    yield from (slice(start, start + size) for start in range(0, count, size))


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens as `(rows, length)`, and the mask of what is no padding."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[_FILLER] * (length - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
