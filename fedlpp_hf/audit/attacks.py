# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What clients can make of what they hold: the proxies they were sent, and their own rows.

Attackers are adapters on the base. What they can't have (the server's adapter, the full model, others' rows and updates)
is nowhere a parameter here.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import TrainerCallback

from ..processes.measurement import replaced_options
from ..server.loop import FederatedServer
from ..tensors.adapters import copy_adapter
from ..wire.encoding import restore_tensors
from ..wire.messages import ClientTask


Adapter = dict[str, torch.Tensor]

SMOOTHING = 0.5
MOST_PROXIES = 5  # that the best of is chosen from, spread over the rounds


def find_broadcasts(records: Iterable[Mapping[str, Any]], clients: Iterable[str], broadcasts: bool) -> list[int]:
    """The rounds in which any of `clients` was sent a proxy, oldest first.

    A client that was asked has the proxy, whether or not its update was accepted.
    """
    if not broadcasts:
        return []
    return [record["round"] for record in records if record["round"] and set(clients) & set(record["asked"])]


def restore_proxies(server: FederatedServer, clients: Iterable[str]) -> list[Adapter]:
    """The proxies that `clients` were sent between them, oldest first, as float32 tensors.

    They are made again from the committed rounds, as the server's quantizer is deterministic.
    """
    rounds = find_broadcasts(server.store.records(), list(clients), server.args.broadcasts)
    return [restore_tensors(server.make_proxy(server.store.load(number - 1)[0])) for number in rounds]


def average_proxies(proxies: Sequence[Mapping[str, torch.Tensor]]) -> Adapter:
    """The mean of `proxies`, factor by factor: it cancels rounding errors that differ from round to round."""
    return {key: torch.stack([proxy[key].double() for proxy in proxies]).mean(0).float() for key in proxies[0]}


def smooth_proxies(proxies: Sequence[Mapping[str, torch.Tensor]], decay: float = SMOOTHING) -> Adapter:
    """The exponential moving average of `proxies`, oldest first: later rounds are better trained, and count more."""
    mean = {key: value.double() for key, value in proxies[0].items()}
    for proxy in proxies[1:]:
        mean = {key: decay * value + (1 - decay) * proxy[key].double() for key, value in mean.items()}
    return {key: value.float() for key, value in mean.items()}


def combine_proxies(proxies: Sequence[Adapter]) -> dict[str, Adapter]:
    """What can be had of `proxies`, oldest first, without training: each of them, means, and a moving average."""
    if not proxies:
        return {}
    found = {"last proxy": proxies[-1]}
    spread = {round(place * (len(proxies) - 1) / (MOST_PROXIES - 1)) for place in range(MOST_PROXIES - 1)}
    for place in sorted(spread - {len(proxies) - 1}):
        found[f"proxy {place + 1} of {len(proxies)}"] = proxies[place]
    if len(proxies) > 1:
        found["mean of proxies"] = average_proxies(proxies)
        found["mean of later half"] = average_proxies(proxies[len(proxies) // 2 :])  # the first are barely trained
        found["moving average of proxies"] = smooth_proxies(proxies)
    return found


def pool_rows(datasets: Sequence[Any]) -> Any:
    """The rows of several clients as one dataset."""
    return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)


def fine_tune(
    trainer: Any,
    rows: Any,
    start: Mapping[str, torch.Tensor],
    steps: Collection[int],
    learning_rate: float,
    seed: int,
) -> dict[int, Adapter]:
    """Train the base with the adapter `start` on `rows`, as a client would; the adapters by the number of steps.

    One run serves for a search over steps: a longer one begins with the batches of a shorter one.

    Args:
        trainer: The federation's trainer.
        rows: Prepared rows.
        start: The adapter to start from.
        steps: When to take the adapter; the run ends with the last.
        learning_rate: Constant over the run.
        seed: Of batches and dropout.
    """
    snapshots = _Snapshots(trainer.guard.parameters, set(steps))
    task = ClientTask(
        federation_id="audit",
        round=1,
        num_rounds=1,
        client_id="audit",
        seed=seed,
        base_fingerprint=trainer.guard.fingerprint,
        proxy=start,
    )
    options = {
        "learning_rate": learning_rate,
        "max_steps": max(steps),
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    with replaced_options(trainer.args, options), _callback(trainer, snapshots):
        trainer.train_client(task, rows)
    return snapshots.taken


class _Snapshots(TrainerCallback):
    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], steps: set[int]):
        self.parameters, self.steps = parameters, steps
        self.taken: dict[int, Adapter] = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.taken[state.global_step] = copy_adapter(self.parameters)


@contextmanager
def _callback(trainer: Any, callback: TrainerCallback) -> Iterator[None]:
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)
