# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation's rounds as a Trainer's steps: the `TrainerState` for users, the events for callbacks."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput, speed_metrics

from ..config.federated import FederatedConfig
from ..config.metrics import MetricChoice, is_number
from ..privacy.secure_sums.rounds import RoundSum, list_answered
from ..report.metrics import count_steps, flatten_record, mean_client_loss
from ..server.best import read_judged
from ..server.loop import TrainClients
from ..server.store import RoundStore
from ..wire.messages import ClientFailure, ClientTask, ClientUpdate
from .callbacks import EventHandler


class Rounds:
    """The rounds of one `train()`.

    Args:
        args: The federation's options.
        handler: Of the callbacks.
        can_evaluate: Whether there is an evaluation dataset.

    Raises:
        ValueError: if early stopping has nothing to judge rounds by.
    """

    def __init__(self, args: FederatedConfig, handler: EventHandler, can_evaluate: bool):
        self.args, self.handler = args, handler
        self.store = RoundStore(args.output_dir)
        self.choice = MetricChoice.of(args)
        self.state = TrainerState(
            max_steps=args.num_rounds,
            num_train_epochs=args.num_rounds,
            logging_steps=1,
            eval_steps=1,
            save_steps=1,
            train_batch_size=args.train_batch_size,
        )
        self.control = TrainerControl()
        self._number = 0
        self._begun: set[str] = set()
        self._first: int | None = None  # the first round of this run
        self.start_clock: Callable[[str], None] = lambda client_id: None  # told when a client's run begins here
        self._started = time.time()
        for callback in self._stoppers:
            callback.early_stopping_patience_counter = 0
        if self._stoppers and (args.metric_for_best_model is None or not can_evaluate):
            missing = "eval_dataset" if args.metric_for_best_model else "metric_for_best_model, such as 'loss'"
            raise ValueError(
                f"EarlyStoppingCallback judges rounds by metric_for_best_model={args.metric_for_best_model!r} on "
                f"eval_dataset; pass {missing}."
            )

    @property
    def _stoppers(self) -> list[EarlyStoppingCallback]:
        return [callback for callback in self.handler.callbacks if isinstance(callback, EarlyStoppingCallback)]

    def follow(self, train_clients: TrainClients) -> TrainClients:
        """`train_clients` with the events of rounds and clients."""

        def train(tasks: list[ClientTask]) -> Iterator[ClientUpdate | ClientFailure | RoundSum]:
            self._number, self._begun = tasks[0].round, set()
            self._call("on_round_begin", client_ids=[task.client_id for task in tasks])
            for answer in train_clients(tasks):
                # Of a sum nothing is known of a single client.
                metrics = dict(answer.metrics) if isinstance(answer, ClientUpdate) else {}
                reason = answer.reason if isinstance(answer, ClientFailure) else None
                for client in list_answered(answer):
                    self._announce(client)
                    told = None if reason is not None else metrics
                    self._call("on_client_end", client_id=client, metrics=told, reason=reason)
                yield answer

        return train

    def begin(self) -> None:
        """Tell callbacks that the rounds begin."""
        self._call("on_federation_begin")

    def begin_client(self, client_id: str) -> None:
        """A client's run begins on this machine: time it, and tell callbacks."""
        self.start_clock(client_id)
        self._announce(client_id)

    def _announce(self, client_id: str) -> None:
        if client_id not in self._begun:
            self._begun.add(client_id)
            self._call("on_client_begin", client_id=client_id)

    def on_round(self, record: dict[str, Any]) -> bool:
        """Take in a committed round; returns whether a callback wants it to be the last."""
        self._number = number = record["round"]
        if self._first is None:
            self._first = max(number, 1)
            self._recall(self.store.records()[:number])
        self._append(record)
        if not number:
            return False
        metrics = dict(read_judged(record))
        if metrics:
            self.control = self.handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._judge(record)
        self._call("on_round_end", record=record)
        return self.control.should_training_stop

    def finish(self, records: Sequence[dict[str, Any]]) -> TrainOutput:
        """The rounds are over: what `train()` returns, as a Trainer's."""
        if self._first is None:  # a resumed federation that had no round left
            self._recall(records)
            self._first = len(records)
        done = records[self._first :]
        steps = sum(map(count_steps, done))
        batch = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        metrics = speed_metrics("train", self._started, num_samples=steps * batch, num_steps=steps)
        loss = mean_client_loss(records[-1]) if records[-1]["clients"] else float("nan")
        metrics |= {"total_flos": 0.0, "train_loss": loss, "epoch": self.state.epoch}
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        return TrainOutput(self.state.global_step, loss, metrics)

    def end(self) -> None:
        """Tell callbacks that the rounds are over."""
        self._call("on_federation_end")

    def _recall(self, records: Sequence[dict[str, Any]]) -> None:
        """Take in the rounds before this run: the state and early stopping are as if it had not been interrupted."""
        for record in records:
            self._append(record)
            if record["round"]:
                metrics = dict(read_judged(record))
                for callback in self._stoppers if metrics else ():
                    # Its own control: that the rounds before were stopped does not stop those that were asked for now.
                    callback.on_evaluate(self.args, self.state, TrainerControl(), metrics)
                self._judge(record)

    def _append(self, record: Mapping[str, Any]) -> None:
        """A round is a step, and an epoch, too: so that what plots a Trainer's history plots this one."""
        number = record["round"]
        self.state.global_step, self.state.epoch = number, float(number)
        views = {
            name: value for name, value in flatten_record(record).items() if name.startswith(("proxy/", "server/"))
        }
        loss = {"loss": mean_client_loss(record)} if record["clients"] else {}
        entry = {**loss, **read_judged(record), **views, "epoch": float(number), "step": number}
        self.state.log_history.append(entry)

    def _judge(self, record: Mapping[str, Any]) -> None:
        key, best = self.choice.key, self.state.best_metric
        value = None if key is None else read_judged(record).get(key)
        if key is None or value is None or not is_number(value) or value != value:
            return
        if best is None or self.choice.is_better(key, value, best):
            self.state.best_metric, self.state.best_global_step = value, record["round"]
            self.state.best_model_checkpoint = str(self.store.round_dir(record["round"]))

    def _call(self, event: str, **values: Any) -> None:
        if event not in ("on_federation_begin", "on_federation_end"):
            values = {"round_number": self._number, **values}
        self.control = self.handler.call_event(event, self.args, self.state, self.control, **values)
