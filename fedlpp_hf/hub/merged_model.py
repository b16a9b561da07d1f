# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What may be pushed as a merged model, checked before anything heavy is imported."""

import json
import os
from pathlib import Path

from ..base.shards import read_shards
from ..merge.destination import VIEW_MARK
from ..server.store import FEDERATION_DIR


# Files of a client, and files with a secret: TrainingArguments carry the Hub's token.
_NEVER_PUSHED = ("base_manifest.json", "task.safetensors", "update.safetensors", "training_args.bin")


def check_merged(directory: str | os.PathLike) -> None:
    """Check that a directory is a whole merged model and nothing else.

    Raises:
        ValueError: saying what it is, or what of it is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"`{directory}` is not a directory; expected a merged model.")
    if (directory / FEDERATION_DIR).exists():
        raise ValueError(
            f"`{directory}` has `{FEDERATION_DIR}`, the state of a federation with files of its clients. Push the "
            "directory that the merge wrote."
        )
    for path in sorted(directory.rglob("*")):
        if path.name in _NEVER_PUSHED:
            name = path.relative_to(directory)
            raise ValueError(f"`{directory}` has `{name}`, which must not be published. Is it a client's directory?")
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`{directory / 'config.json'}` can't be read ({error}); expected a merged model.") from error
    if config.get("quantization_config") or config.get(VIEW_MARK):
        raise ValueError(
            f"`{directory}` is a client's view: a quantized model, or one merged into its base. Push a model that was "
            "merged into the full-precision weights."
        )
    read_shards(directory)  # every shard whole, and where the index says
