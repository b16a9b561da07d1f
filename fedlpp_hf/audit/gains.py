# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What an update raises: the probability of the tokens that it was trained on, after the tokens before them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..client.checks import find_peft_model
from ..tensors.adapters import adapter_parameters, copy_adapter, load_adapter_
from .inputs import count_tokens, pad_rows, split_batches
from .observed import ObservedUpdate


_BATCH = 256
_FIRST = 3
_VISIBLE = (
    0.01  # mean change of a log-probability that stands out of float32's rounding, and is still a first derivative
)
_SHORTLIST = 16  # of last tokens by their rise, which the gradient then tells apart
_LONGEST = 1e6  # times the update


class GainModel:
    """A causal model before and after an update, which is lengthened until it shows.

    One step along −∇ loss raises the logit of each token that was trained on, after its own prefix, more than of others: the
    derivative of all logits along Δ costs two forward passes. It needs no span, so neither the rank nor the optimizer limits it.
    """

    def __init__(self, model: Any, update: ObservedUpdate):
        self.model, self.update = model, update
        self.parameters = adapter_parameters(find_peft_model(model))
        self._length = 0.0

    @contextmanager
    def held(self, adapter: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The model with `adapter`, and afterwards as it was."""
        before, training = copy_adapter(self.parameters), self.model.training
        load_adapter_(self.parameters, adapter)
        self.model.eval()
        try:
            yield
        finally:
            load_adapter_(self.parameters, before)
            self.model.train(training)

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model gives each place of a row the next token's log-probabilities."""
        with torch.no_grad():
            logits = getattr(
                self.model(input_ids=torch.tensor([[_FIRST, _FIRST]], device=self._device)), "logits", None
            )
        return logits is not None and logits.dim() == 3 and logits.shape[-1] >= count_tokens(self.model)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def find_length(self, change: float) -> float:
        """The multiple of Δ that changes the log-probabilities after one token by `change` in the mean."""
        rows = [[token] for token in range(_FIRST, _FIRST + 8)]
        before, length = self.read(rows, 0.0), 1.0
        while length < _LONGEST and float((self.read(rows, length) - before).abs().mean()) < change:
            length *= 2
        return length

    def measure_rises(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """By how much the update raises the log-probability of each token after each of `rows`: `(rows, vocabulary)`."""
        if not self._length:
            self._length = self.find_length(_VISIBLE)
        return self.read(rows, self._length) - self.read(rows, 0.0)

    def finish_rows(self, rows: Sequence[Sequence[int]], replace: bool = False) -> list[list[int]]:
        """`rows` with a last token each: it is a label only, has no gradient of its own, and so is in no span.

        Of the tokens that rise most, the one is taken with which the rows' gradient points most along the update. With `replace` it
        takes the place of the last token, if it is better.
        """
        if not rows:
            return []
        starts = [list(row[:-1] if replace else row) for row in rows]
        risen, likely = (
            values.topk(min(_SHORTLIST, values.shape[1]), -1).indices.tolist()
            for values in (self.measure_rises(starts), self.read(starts, 1.0))
        )
        choices = [list(dict.fromkeys(a + b)) for a, b in zip(risen, likely, strict=True)]
        found = [list(row) if replace else [*row, tokens[0]] for row, tokens in zip(rows, choices, strict=True)]
        for place, tokens in [*enumerate(choices)] * (2 if len(rows) == 2 else 1):
            tried = [[*found[:place], [*starts[place], token], *found[place + 1 :]] for token in tokens]
            found = max([found, *tried], key=self.measure_match)
        return found

    def measure_match(self, rows: Sequence[Sequence[int]]) -> float:
        """The cosine of Δ and minus the gradient of the mean loss of all tokens of `rows` but the first ones, at the start."""
        if max(map(len, rows), default=0) < 2:
            return 0.0
        ids, mask = pad_rows(rows)
        ids, mask = ids.to(self._device), mask.to(self._device)
        keys = [key for key in self.update.delta if key in self.parameters]
        flags = {key: self.parameters[key].requires_grad for key in keys}
        for key in keys:
            self.parameters[key].requires_grad_(True)
        with torch.enable_grad():
            logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
            labels = ids.masked_fill(mask == 0, -100)[:, 1:]
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
            gradients = torch.autograd.grad(loss, [self.parameters[key] for key in keys], allow_unused=True)
        for key, flag in flags.items():
            self.parameters[key].requires_grad_(flag)
        inner = lengths = norms = 0.0
        for key, gradient in zip(keys, gradients, strict=True):
            delta = self.update.delta[key].double()
            norms += float(delta.square().sum())
            if gradient is not None:
                inner -= float((gradient.cpu().double() * delta).sum())
                lengths += float(gradient.double().square().sum())
        return inner / (lengths * norms) ** 0.5 if lengths and norms else 0.0

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[int]], length: float) -> torch.Tensor:
        """Log-probabilities of the next token, with the adapter at start + `length` · Δ."""
        start, delta = self.update.start, self.update.delta
        moved = {key: value + length * delta[key] if key in delta else value for key, value in start.items()}
        load_adapter_(self.parameters, moved)
        found = []
        for part in split_batches(len(rows), _BATCH):
            ids, mask = pad_rows(rows[part])
            logits = (
                self.model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device)).logits.float().cpu()
            )
            found.append(logits[torch.arange(len(ids)), mask.sum(1) - 1].log_softmax(-1))
        load_adapter_(self.parameters, start)
        return torch.cat(found)
