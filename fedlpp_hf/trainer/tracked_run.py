# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation as one run of each tracker: begun with its first round, continued when it is resumed, with names that group."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerControl
from transformers.trainer_callback import DefaultFlowCallback

from ..server.store import RoundStore
from .callbacks import EventHandler
from .trackers import check_uploads


# Weights & Biases otherwise stores the command line, the script's path, the directory, the remote of git, and the terminal.
_WANDB = {
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_X_DISABLE_META": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_RESUME": "allow",
}
# Tags that MLflow sets from the process, in place of the script's path and the user's name.
_MLFLOW = {"MLFLOW_RUN_CONTEXT": '{"mlflow.source.name": "fedlpp_hf", "mlflow.user": "owner"}'}


class TrackedRun(EventHandler):
    """Trackers of one federation, each with one run for all of its rounds.

    A run is named `run_name`, by default after `output_dir`, with the federation's id: a resumed federation goes on in the
    run that it began, at the next round, and a new one in the same directory has a run of its own.

    Args:
        trackers: Callbacks of Transformers.
        model: Of the trainer.
        store: The federation's rounds.
        resumes: Whether the federation on disk is resumed.

    Raises:
        ValueError: if a tracker would upload the federation's files.
    """

    def __init__(self, trackers: Sequence[Any], model: Any, store: RoundStore, resumes: bool):
        check_uploads(trackers)
        super().__init__([DefaultFlowCallback, *trackers], model, None)
        self._store = store
        self._resumes = resumes and store.latest() is not None
        self._begun = False

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl) -> TrainerControl:
        """Begin the run, unless the federation is new: its id is known with its first round."""
        return self._begin(args, state, control) if self._resumes else control

    def on_log(self, args: Any, state: Any, control: TrainerControl, logs: Mapping[str, float]) -> TrainerControl:
        """Log a round's numbers under the names that they have."""
        if not self._begun:
            control = self._begin(args, state, control)
        return super().on_log(self._name(args), state, control, {_GroupedName(k): v for k, v in logs.items()})

    def on_train_end(self, args: Any, state: Any, control: TrainerControl) -> TrainerControl:
        """End the run, if it has begun."""
        return super().on_train_end(self._name(args), state, control) if self._begun else control

    def _begin(self, args: Any, state: Any, control: TrainerControl) -> TrainerControl:
        named, self._begun = self._name(args), True
        for tracker in self.trackers:
            if getattr(tracker, "logging_dir", "") is None:  # TensorBoard's; it makes a directory for each start
                tracker.logging_dir = str(Path(args.output_dir) / "runs" / named.run_name)
        with _environment({**_WANDB, "WANDB_RUN_ID": self._read_id(), **_MLFLOW}):
            return super().on_train_begin(named, state, control)

    def _name(self, args: Any) -> Any:
        """`args` with a name for the run."""
        named = copy.copy(args)
        named.run_name = args.run_name or f"{Path(args.output_dir).absolute().name}-{self._read_id()[:6]}"
        return named

    def _read_id(self) -> str:
        return str(self._store.read()["federation_id"])


class _GroupedName(str):
    """A name such as `server/eval_loss`, which has its group: trackers of Transformers would put all into `train/`."""

    def __radd__(self, prefix: str) -> str:
        return str(self)


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Variables for trackers that read them when a run begins; what the user has set, and afterwards all, stays as it is."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
