# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What trackers (trackio, Weights & Biases, …) are shown: no path of the owner's, no name of its model, no weights."""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments


# Trackers that upload what is in `output_dir` where a variable says so: the clients' base, with all rounds.
_UPLOADS = {
    "WandbCallback": "WANDB_LOG_MODEL",
    "CometCallback": "COMET_LOG_ASSETS",
    "DVCLiveCallback": "HF_DVCLIVE_LOG_MODEL",
}


def check_uploads(trackers: Iterable[Any]) -> None:
    """Refuse trackers that would upload the federation's files.

    Raises:
        ValueError: naming the variable that says so.
    """
    for tracker in trackers:
        variable = _UPLOADS.get(type(tracker).__name__, "")
        if os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off"):
            raise ValueError(
                f"{variable}={os.environ[variable]}: {type(tracker).__name__} would upload the federation's files, with the base "
                "and every round. Unset it; push the adapter with `trainer.push_to_hub()`."
            )


def hide_owner(args: TrainingArguments) -> TrainingArguments:
    """A copy of `args` for trackers: what they write down names neither paths nor the full model.

    Attributes stay, because trackers write their own files to `output_dir`. Repositories that they make are private, unless
    `hub_private_repo` is False.
    """
    cls = type(args)

    def to_dict(self: Any) -> dict[str, Any]:
        values = {name: _hide_paths(value) for name, value in cls.to_dict(self).items()}
        values["output_dir"] = Path(self.output_dir).absolute().name
        return values | {"full_model": None if values.get("full_model") is None else "<FULL_MODEL>"}

    shown = copy.copy(args)
    shown.__class__ = type(cls.__name__, (cls,), {"to_dict": to_dict, "__module__": cls.__module__})
    if shown.hub_private_repo is None:
        shown.hub_private_repo = True
    return shown


class TrackedModel:
    """What a tracker writes down of a model: its configuration and size, and nothing that could be uploaded."""

    def __init__(self, model: Any):
        self._count = sum(parameter.numel() for parameter in model.parameters()) if hasattr(model, "parameters") else 0
        self.config = copy.deepcopy(getattr(model, "config", None))
        for holder in (self.config, getattr(self.config, "text_config", None)):
            if getattr(holder, "_name_or_path", ""):
                setattr(holder, "_name_or_path", "")  # noqa: B010
        self.peft_config = copy.deepcopy(getattr(model, "peft_config", None))
        for config in (self.peft_config or {}).values():
            config.base_model_name_or_path = config.revision = None

    def num_parameters(self) -> int:
        """As of a `PreTrainedModel`."""
        return self._count

    def parameters(self) -> list[torch.nn.Parameter]:
        """None: a tracker has no use for them but to upload."""
        return []


def _hide_paths(value: Any) -> Any:
    """`value` with the last part in place of each path."""
    if isinstance(value, dict):
        return {key: _hide_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_hide_paths(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return Path(value).name
    if isinstance(value, str) and (os.path.isabs(value) or (os.sep in value and os.path.exists(value))):
        return Path(value).name
    return value
