# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Who hears what: callbacks of local runs, callbacks of rounds, and trackers, which see nothing of the owner's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from .trackers import TrackedModel, hide_owner


TRACKERS = tuple(INTEGRATION_TO_CALLBACK.values())


class FederatedCallback(TrainerCallback):
    """A `TrainerCallback` that also hears of the federation's rounds. All events are optional.

    `args`, `state` and `control` are as in Transformers, with rounds for steps: `state.global_step` is the last committed
    round, `state.log_history` has an entry for each, and `control.should_training_stop = True` ends the federation after the
    round under way. The events of [`~transformers.TrainerCallback`] come from each client's local run, with the state of that
    run, but for `on_evaluate`, which comes once after each round with the server's metrics.
    """

    def on_federation_begin(self, args, state, control, **kwargs):
        """Before the first round of this run."""

    def on_round_begin(self, args, state, control, *, round_number: int, client_ids: Sequence[str], **kwargs):
        """Before a round's tasks go out to `client_ids`."""

    def on_client_begin(self, args, state, control, *, round_number: int, client_id: str, **kwargs):
        """Before a client's local run. Over a network that moment is unknown: then right before `on_client_end`."""

    def on_client_end(self, args, state, control, *, round_number: int, client_id: str, metrics, reason, **kwargs):
        """After a client's local run: its `metrics`, or None and the `reason` why there is no update.

        Under secure aggregation it comes when the round's sum is open, with empty `metrics`.
        """

    def on_round_end(self, args, state, control, *, round_number: int, record: dict[str, Any], **kwargs):
        """After a round's commit and `on_evaluate`; `record` is its `round.json`."""

    def on_federation_end(self, args, state, control, **kwargs):
        """After the last round of this run, before the merge and the audit."""


class EventHandler(CallbackHandler):
    """Transformers' handler, which knows whether an event is of a local run.

    Trackers and early stopping mean rounds: in a local run they hear nothing. Trackers get arguments and a model without
    what is the owner's.
    """

    def __init__(self, callbacks: Sequence[Any], model: Any, processing_class: Any):
        super().__init__(list(callbacks), model, processing_class, None, None)
        self._scope = ""

    @classmethod
    def of(cls, handler: CallbackHandler) -> "EventHandler":
        """A handler with the callbacks of another one."""
        return cls(handler.callbacks, handler.model, handler.processing_class)

    @contextmanager
    def local_run(self) -> Iterator[None]:
        """Events are those of a client's run."""
        with self._within("local run"):
            yield

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Nobody hears an event: a round's own evaluation, of which they hear with the round."""
        with self._within("silence"):
            yield

    @contextmanager
    def _within(self, scope: str) -> Iterator[None]:
        before, self._scope = self._scope, scope
        try:
            yield
        finally:
            self._scope = before

    @property
    def trackers(self) -> list[TrainerCallback]:
        """Those of the callbacks that are trackers."""
        return [callback for callback in self.callbacks if isinstance(callback, TRACKERS)]

    def call_event(self, event: str, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Transformers' method; a callback without such an event is passed over."""
        if self._scope == "silence":
            return control
        for callback in list(self.callbacks):
            if self._scope == "local run" and means_rounds(callback):
                continue
            call = getattr(callback, event, None)
            if call is None:
                continue
            shown = {
                "model": self.model,
                "processing_class": self.processing_class,
                "optimizer": self.optimizer,
                "lr_scheduler": self.lr_scheduler,
                "train_dataloader": self.train_dataloader,
                "eval_dataloader": self.eval_dataloader,
            }
            arguments = args
            if isinstance(callback, TRACKERS):
                arguments = hide_owner(args)
                shown = dict.fromkeys(shown) | {"model": TrackedModel(self.model)}
            control = call(arguments, state, control, **shown, **kwargs) or control
        return control


def means_rounds(callback: TrainerCallback) -> bool:
    """Whether a callback has nothing to do with a local run: trackers, early stopping, a notebook's table of progress."""
    notebook = type(callback).__module__ == "transformers.utils.notebook"
    return notebook or isinstance(callback, (EarlyStoppingCallback, *TRACKERS))
