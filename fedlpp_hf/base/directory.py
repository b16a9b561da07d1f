# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Writing the directory of a base: whole or not at all, in shards, without what tells of the owner."""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..tensors.atomic import hash_file
from ..tensors.scratch import replaced_directory
from .contents import read_json
from .manifest import BASE_MANIFEST, write_json
from .shards import WEIGHTS, WEIGHTS_INDEX


_OWNERS_KEYS = ("name_or_path", "_commit_hash", "auto_map", "_file", "_path", "_dir")


@contextmanager
def new_base_directory(output_dir: Path, overwrite: bool) -> Iterator[Path]:
    """Make a directory to write into, which becomes `output_dir` when the block ends, or is removed when it fails.

    Raises:
        ValueError: if `output_dir` exists, unless it is a base and `overwrite` is set.
        RuntimeError: if another process is writing it.
    """
    with replaced_directory(output_dir, "writing") as directory:
        if output_dir.exists() and not overwrite:
            raise ValueError(f"`{output_dir}` exists; pass overwrite=True to replace the base in it.")
        if output_dir.exists() and not (output_dir / BASE_MANIFEST).is_file():
            raise ValueError(
                f"`{output_dir}` has no `{BASE_MANIFEST}`, so it is not a base and is not overwritten. Choose "
                "another directory."
            )
        directory.mkdir()
        yield directory


class ShardWriter:
    """Writes tensors to safetensors files named as transformers does, each while the next one's tensors come in.

    A file has at most `max_shard_size` bytes, or one tensor. Use it as a context manager; then `finish` names the files,
    and `digests` has their sha256.
    """

    def __init__(self, directory: Path, max_shard_size: int):
        self.directory, self.max_shard_size = directory, max_shard_size
        self.shards: list[list[str]] = []
        self.pending: dict[str, torch.Tensor] = {}
        self.total_size = self.pending_size = 0
        self.saved: list[Future[str]] = []
        self.digests: dict[str, str] = {}

    def __enter__(self) -> "ShardWriter":
        self.thread = ThreadPoolExecutor(1)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._flush()
        self.thread.shutdown(cancel_futures=error is not None)

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Add tensors, which must not change afterwards."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.pending and self.pending_size + size > self.max_shard_size:
            self._flush()
        self.pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.pending_size += size
        self.total_size += size

    def finish(self) -> None:
        """Name the files, and write the index if there are several."""
        weight_map: dict[str, str] = {}
        for number, (names, saved) in enumerate(zip(self.shards, self.saved, strict=True), 1):
            file = f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            file = WEIGHTS if len(self.shards) == 1 else file
            self.digests[file] = saved.result()
            (self.directory / f"shard-{number}").rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        if len(self.shards) > 1:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            write_json(self.directory / WEIGHTS_INDEX, index)

    def _flush(self) -> None:
        if self.saved:
            self.saved[-1].result()  # two shards in memory are enough
        self.shards.append(sorted(self.pending))
        path = self.directory / f"shard-{len(self.shards)}"
        self.saved.append(self.thread.submit(_save_shard, self.pending, path))
        self.pending, self.pending_size = {}, 0


def _save_shard(tensors: dict[str, torch.Tensor], path: Path) -> str:
    save_file(tensors, path, metadata={"format": "pt"})
    tensors.clear()  # memory is for the next shard while this one is read again
    return hash_file(path)


def write_companions(paths: Sequence[Path], config: dict[str, Any], directory: Path, secrets: Sequence[str]) -> None:
    """Write the configuration, and copy the files of the tokenizer or processor, without what tells of the owner.

    Args:
        paths: the files to copy.
        config: the configuration, as JSON values.
        directory: the directory of the base.
        secrets: strings that must not be in it.
    """
    write_json(directory / "config.json", scrub(config, secrets))
    for path in paths:
        if path.name.endswith("config.json"):
            write_json(directory / path.name, scrub(read_json(path), secrets))
        else:
            shutil.copyfile(path, directory / path.name)


def scrub(value: Any, secrets: Sequence[str]) -> Any:
    """Remove from JSON the keys that hold paths or names, and the strings with one of `secrets`."""

    def tells(item: Any) -> bool:
        return isinstance(item, str) and any(secret in item for secret in secrets)

    if isinstance(value, dict):
        kept = {
            str(key): item for key, item in value.items() if not str(key).endswith(_OWNERS_KEYS) and not tells(item)
        }
        return {key: scrub(item, secrets) for key, item in kept.items()}
    if isinstance(value, list):
        return [scrub(item, secrets) for item in value if not tells(item)]
    return value
