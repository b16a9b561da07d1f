# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Whether an adapter can be merged into a full model, before anything is trained."""

import os
from pathlib import Path
from typing import Any

from ..base.full_model import FullModel
from .adapter_reader import open_adapters
from .peft_models import NeedsPeft
from .plan import plan_merge


def check_merge(
    full_model: str | os.PathLike, adapter_dir: Path, model_class: Any = None, revision: str | None = None
) -> None:
    """Plan the merge of an adapter as it is before training, from the headers of the full model alone.

    Args:
        full_model: a directory, or a name on the Hub.
        adapter_dir: the adapter.
        model_class: the class that it is trained on.
        revision: branch, tag or commit of the full model on the Hub.

    Raises:
        ValueError: as [`merge_adapter`] would after all rounds.
    """
    source = FullModel(full_model, revision)
    adapters, _ = open_adapters(adapter_dir)
    try:
        plan_merge(source.read_config(), source.shapes, adapters, model_class)
    except NeedsPeft:
        return  # PEFT merges it with the model in memory; nothing can be told from headers
