# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""PEFT's own merge, for adapters that are more than s·B·A: correct, but the whole model is in memory."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers.utils import logging

from ..base.full_model import FullModel
from ..tensors.adapters import adapter_parameters, check_keys
from .adapter_reader import AdapterReader
from .destination import check_room
from .peft_models import list_model_classes


logger = logging.get_logger(__name__)


def check_alone(reason: str, count: int, has_base: bool, source: FullModel) -> None:
    """Refuse what PEFT's own merge can't do.

    Args:
        reason: why PEFT has to merge.
        count: of the adapters.
        has_base: whether a base was given.
        source: the full model.

    Raises:
        ValueError: for several adapters, a base, or shards that are to be deleted.
    """
    if count > 1 or has_base or source.scratch is not None:
        raise ValueError(
            f"The adapter needs PEFT's own merge ({reason}), which merges one adapter into W, in memory. Leave out the "
            "other adapters, base_dir and delete_source_shards."
        )


def merge_through_peft(
    reason: str, source: FullModel, config: Any, reader: AdapterReader, work: Path, model_class: Any
) -> None:
    """Load the full model, let PEFT merge the adapter, and save into a directory.

    Args:
        reason: why PEFT merges, for a warning.
        source: the full model.
        config: its configuration.
        reader: the adapter.
        work: the directory.
        model_class: the class the adapter was trained on; None where configurations tell.

    Raises:
        ValueError: if the adapter does not fit the model, or the result is not finite.
        OSError: if there is too little room.
    """
    check_room(work, source.size)
    gigabytes = source.size / 1e9
    logger.warning(f"Merging through PEFT, because {reason}: the whole model, {gigabytes:.1f} GB, is held in memory.")
    found = list_model_classes(config, reader.config, model_class)[0] or getattr(
        transformers, (config.architectures or ["AutoModel"])[0]
    )
    model = found.from_pretrained(**source.pretrained_arguments, dtype="auto")
    peft_model = PeftModel.from_pretrained(model, reader.directory, config=reader.config)
    check_keys(reader.keys, adapter_parameters(peft_model))
    merged = peft_model.merge_and_unload(safe_merge=True)
    for name, tensor in merged.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"`{name}` would have values that are NaN or infinite after the merge.")
    source.copy_companions(work)
    merged.save_pretrained(work)
