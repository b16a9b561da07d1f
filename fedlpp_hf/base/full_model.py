# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The full-precision model W, on disk or on the Hub: the one class that opens it."""

import os
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from transformers import AutoConfig
from transformers.utils import logging

from ..tensors.files import DTYPES, read_tensor
from ..tensors.names import ADAPTER_CONFIG
from .contents import check_link
from .hub_repository import HubRepository, HubUnreachable, find_in_cache, find_missing
from .manifest import BASE_MANIFEST
from .quantized_weights import check_configuration, check_scales
from .shards import Shard, collect_shards, parse_shard, read_shard, read_shards


logger = logging.get_logger(__name__)

# Weights in other formats, adapters, and what a federation keeps. A pickle runs code when it is opened, so it is not
# even downloaded.
_LEFT_BEHIND = [
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.h5", "*.msgpack", "*.onnx",
    "*.onnx_data", "*.ot", "*.gguf", "*.index.json",
]  # fmt: skip
_LEFT_BEHIND_NAMES = (ADAPTER_CONFIG, BASE_MANIFEST, "training_args.bin")


class FullModel:
    """A full-precision checkpoint of safetensors, on disk or on the Hub, read tensor by tensor.

    Headers are read first, from the Hub by range requests, so that everything can be planned before a shard is
    downloaded. A shard is fetched when it is wanted.

    Args:
        model: a directory, or a name on the Hub. With HF_HUB_OFFLINE set, or where the Hub can't be reached, its cache
            stands for it.
        revision: branch, tag or commit on the Hub.
        token: for the Hub; by default that of `hf auth login`.
        scratch: a directory that shards are downloaded to, until [`release`]; by default the Hub's cache.

    Raises:
        ValueError: if there is no such model, it has no safetensors, or files and index differ.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        revision: str | None = None,
        token: str | None = None,
        scratch: Path | None = None,
    ):
        self.model, self.scratch, self._revision = str(model), scratch, revision
        self._repository: HubRepository | None = None
        self._place = self.model  # what errors call it
        self._fetched: dict[str, Path] = {}
        if Path(model).is_dir():
            self.directory = Path(model)
        elif self.model.count("/") > 1 or self.model.startswith((".", "~", "/")):
            raise ValueError(f"`{model}` is neither a directory nor a name on the Hub (`owner/name`).")
        elif is_offline_mode():
            self.directory = find_in_cache(model, revision)
            self._place = f"{model} in the Hub's cache (HF_HUB_OFFLINE is set)"
        else:
            try:
                self._repository = HubRepository(self.model, revision, token)
                self.directory = self._repository.directory
            except HubUnreachable as error:
                self.directory = find_in_cache(model, revision, f"the Hub can't be reached ({error})")
                self._place = f"{model} in the Hub's cache (the Hub can't be reached)"
                logger.warning(f"The Hub can't be reached ({error}); `{model}` is read from its cache.")
        if self._repository is None and scratch is not None:
            raise ValueError(
                f"delete_source_shards: `{model}` is on disk, and its shards can't be fetched again when a merge is "
                "interrupted. Leave the option out, or name a model on the Hub."
            )
        self.shards: dict[str, Shard] = (
            read_shards(self.directory, self._place)
            if self._repository is None
            else collect_shards(self.directory, self._repository.sizes, self._read_header, self.model)
        )
        self._files = {name: file for file, shard in self.shards.items() for name in shard.tensors}

    @property
    def is_local(self) -> bool:
        """Whether all shards are on disk already."""
        return self._repository is None

    @property
    def owners_strings(self) -> list[str]:
        """Path and name of the model, which must not be in a file that leaves the owner."""
        # A bare name, as of a folder, could be any word.
        return [str(self.directory.resolve())] + ([self.model] if "/" in self.model else [])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {t.name: t.shape for shard in self.shards.values() for t in shard.tensors.values()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating point tensor by name."""
        tensors = (self.shards[file].tensors[name] for name, file in sorted(self._files.items()))
        floats = (DTYPES[t.dtype] for t in tensors if t.dtype in DTYPES and DTYPES[t.dtype].is_floating_point)
        return next(floats, torch.float32)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards.values())

    def read_config(self) -> Any:
        """Read the model's configuration.

        Raises:
            ValueError: if it can't be read, or the model is quantized.
        """
        check_link(self.directory, self.directory / "config.json")
        try:
            config = AutoConfig.from_pretrained(self.directory)
        except Exception as error:  # every architecture checks its configuration in its own way
            raise ValueError(f"The configuration in `{self.directory}` can't be read ({error}).") from error
        files = os.listdir(self.directory) if self._repository is None else self._repository.sizes
        check_configuration(self.directory / "config.json", files, self.model)
        return config

    def check_scales(self, left_out: Iterable[str]) -> None:
        """Refuse quantized weights that no configuration tells of.

        Args:
            left_out: the tensors that no parameter of the model is made of.

        Raises:
            ValueError: naming a weight and its scale.
        """
        check_scales((t for shard in self.shards.values() for t in shard.tensors.values()), left_out)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, after fetching its shard."""
        file = self._files[name]
        return read_tensor(self.fetch(file), self.shards[file].tensors[name])

    def fetch(self, file: str) -> Path:
        """The path of a shard, which is downloaded if need be.

        Raises:
            ValueError: if its header is not the one read before.
            RuntimeError: if it can't be downloaded.
        """
        if self._repository is None:
            return self.directory / file
        if file not in self._fetched:
            path = self._repository.download_shard(file, self.scratch)
            if read_shard(path).header != self.shards[file].header:
                raise ValueError(
                    f"`{file}` of `{self.model}` has another header than the one read before. Clear the Hub's cache."
                )
            self._fetched[file] = path
        return self._fetched[file]

    def release(self, file: str) -> None:
        """Delete a shard from `scratch`; elsewhere it stays."""
        if self.scratch is not None:
            self._fetched.pop(file).unlink()

    def list_companions(self, names: list[str] | None = None) -> list[Path]:
        """List the other files of the model, after fetching them: configuration, tokenizer, custom code.

        With `names`, only these, at the top. Never weights in other formats, adapters or federations.

        Raises:
            ValueError: if one is a link out of the model's directory.
        """
        if self._repository is not None:
            self._repository.download_files(names, _LEFT_BEHIND)
        if names is not None:
            found = [self.directory / name for name in names if (self.directory / name).is_file()]
        else:
            found = sorted(path for path in self.directory.rglob("*") if path.is_file() and self._is_companion(path))
        return [check_link(self.directory, path) for path in found]

    def copy_companions(self, destination: Path) -> None:
        """Copy what [`list_companions`] lists; links, as in the Hub's cache, become files."""
        if self._place != self.model and (missing := find_missing(self.model, self._revision, _LEFT_BEHIND)):
            logger.warning(f"Files beside the weights are left out, which the Hub's cache does not have: {missing}")
        for path in self.list_companions():
            target = destination / path.relative_to(self.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    def _is_companion(self, path: Path) -> bool:
        return not (
            path.relative_to(self.directory).parts[0].startswith((".", "_", "checkpoint-"))
            or path.name in _LEFT_BEHIND_NAMES
            or any(path.match(pattern) for pattern in _LEFT_BEHIND)
        )

    def _read_header(self, file: str) -> Shard:
        assert self._repository is not None
        return parse_shard(file, self._repository.sizes[file], partial(self._repository.read_range, file))
