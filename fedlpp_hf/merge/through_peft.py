# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""PEFT's own merge, for the adapters that are more than s·B·A: correct, but the whole model is in memory."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from ..tensors.adapters import adapter_parameters, check_keys
from .full_model import FullModel
from .plan import model_classes
from .sources import AdapterReader


def merge_with_peft(
    source: FullModel, config: Any, reader: AdapterReader, work: Path, model_class: Any, token: str | None
) -> None:
    """Load the full model, let PEFT merge the adapter, and save into `work`.

    Raises:
        ValueError: if the adapter does not fit the model, or the result is not finite.
    """
    found = model_classes(config, reader.config, model_class)[0] or getattr(
        transformers, (config.architectures or ["AutoModel"])[0]
    )
    place: dict[str, Any] = {} if source.is_local else {"revision": source.commit, "token": token}
    model = found.from_pretrained(source.directory if source.is_local else source.model, dtype="auto", **place)
    peft_model = PeftModel.from_pretrained(model, reader.file.parent, config=reader.config)
    check_keys(reader.keys, adapter_parameters(peft_model))
    merged = peft_model.merge_and_unload(safe_merge=True)
    for name, tensor in merged.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"`{name}` would have values that are NaN or infinite after the merge.")
    source.copy_companions(work)
    merged.save_pretrained(work)
