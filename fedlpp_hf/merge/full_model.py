# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The full model's files, on disk or on the Hub, its weights fetched shard by shard."""

import functools
import os
import shutil
import time
from pathlib import Path

from .shards import WEIGHTS, WEIGHTS_INDEX, Shard, check_index, parse_shard, read_index, read_shard


# Weights in other formats, adapters, and what a federation keeps: none of it belongs to the merged model.
_LEFT_BEHIND = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.index.json")
_LEFT_BEHIND_NAMES = ("adapter_config.json", "base_manifest.json", "training_args.bin")


_ATTEMPTS = 5
# Set in the `config.json` of a merge into Q(W), so that it is not taken, and pushed, for one into W.
VIEW_MARK = "is_clients_view"


class FullModel:
    """A checkpoint of safetensors: `shards` by file name, and the path of each when it is wanted.

    From the Hub, headers come by range requests, so that everything can be planned before a shard is downloaded; a
    shard goes to the Hub's cache, or with `scratch` into that directory, until [`release`].

    Raises:
        ValueError: if there are no safetensors, or files and index don't fit.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        scratch: Path | None = None,
        revision: str | None = None,
        token: str | None = None,
    ):
        self.model, self.revision, self.token, self.scratch = str(model), revision, token, scratch
        self.directory: Path | None = Path(model) if Path(model).is_dir() else None
        self.is_local = self.directory is not None
        self.weight_map: dict[str, str] | None = None
        self.shards: dict[str, Shard] = {}
        if self.directory is None:
            self._open_remote()
            return
        if scratch is not None:
            raise ValueError(
                f"delete_source_shards: `{model}` is a directory, whose shards can't be fetched again when a merge is "
                "interrupted. Leave it out, or name the model on the Hub."
            )
        index = self.directory / WEIGHTS_INDEX
        # As from_pretrained does: a single file comes before an index.
        if (self.directory / WEIGHTS).is_file():
            self.shards = {WEIGHTS: read_shard(self.directory / WEIGHTS)}
        elif index.is_file():
            self.weight_map = read_index(index.read_text(encoding="utf-8"))
            for file in sorted(set(self.weight_map.values())):
                if not (self.directory / file).is_file():
                    raise ValueError(f"`{self.directory}` has no `{file}`, which its index names. Download it again.")
                self.shards[file] = read_shard(self.directory / file)
            check_index(self.shards, self.weight_map)
        else:
            raise ValueError(
                f"`{self.directory}` has no `{WEIGHTS}` nor `{WEIGHTS_INDEX}`. Pickles are never opened: load the model "
                "with transformers and `save_pretrained` it, which writes safetensors."
            )

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors."""
        return {t.name: t.shape for shard in self.shards.values() for t in shard.tensors.values()}

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards.values())

    def fetch(self, file: str) -> Path:
        """The path of a shard, downloaded if need be."""
        if self.is_local:
            assert self.directory is not None
            return self.directory / file
        path = self._download(file)
        if read_shard(path).header != self.shards[file].header:
            raise ValueError(f"`{file}` of `{self.model}` is not the file whose header was read. Clear the cache.")
        return path

    def release(self, file: str) -> None:
        """Delete a shard that was downloaded for this merge alone."""
        if self.scratch is not None:
            (self.scratch / file).unlink()

    def companions(self) -> list[Path]:
        """Every other file of the model: configuration, tokenizer, custom code; not weights, adapters, federations."""
        assert self.directory is not None
        return sorted(
            path
            for path in self.directory.rglob("*")
            if path.is_file()
            and not any(
                part.startswith((".", "_", "checkpoint-")) for part in path.relative_to(self.directory).parts[:1]
            )
            and path.name not in _LEFT_BEHIND_NAMES
            and not any(path.match(pattern) for pattern in _LEFT_BEHIND)
        )

    def copy_companions(self, destination: Path) -> None:
        assert self.directory is not None
        for path in self.companions():
            target = destination / path.relative_to(self.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # through a cache's link: the copy is a file

    def _open_remote(self) -> None:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

        api = HfApi(token=self.token)
        try:
            info = api.model_info(self.model, revision=self.revision, files_metadata=True)
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise ValueError(f"`{self.model}` is neither a directory nor a model on the Hub ({error}).") from error
        self.commit = info.sha
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
        self.directory = Path(
            snapshot_download(
                self.model,
                revision=self.commit,
                token=self.token,
                ignore_patterns=[p for p in _LEFT_BEHIND if p != "*.index.json"],
            )
        )
        index = self.directory / WEIGHTS_INDEX
        if WEIGHTS not in sizes and index.is_file():
            self.weight_map = read_index(index.read_text(encoding="utf-8"))
        for file in sorted(set(self.weight_map.values())) if self.weight_map else [WEIGHTS]:
            size = sizes.get(file)
            if size is None:
                raise ValueError(f"`{self.model}` has no `{file}` on the Hub; only safetensors are merged.")
            try:
                self.shards[file] = parse_shard(file, size, functools.partial(self._read_range, file))
            except HTTPError as error:
                raise RuntimeError(f"The header of `{file}` of `{self.model}` could not be read ({error}).") from error
        if self.weight_map:
            check_index(self.shards, self.weight_map)

    def _download(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        for attempt in range(_ATTEMPTS):
            try:
                # A partial file is kept and gone on with.
                path = hf_hub_download(
                    self.model, file, revision=self.commit, token=self.token, local_dir=self.scratch, dry_run=False
                )
                return Path(path)
            except HTTPError as error:
                refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
                if refused or attempt == _ATTEMPTS - 1:
                    raise RuntimeError(
                        f"`{file}` of `{self.model}` could not be downloaded ({error}). Nothing was written; try again."
                    ) from error
                time.sleep(2**attempt)
        raise AssertionError("unreachable")

    def _read_range(self, file: str, start: int, length: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        headers = build_hf_headers(token=self.token) | {"Range": f"bytes={start}-{start + length - 1}"}
        url = hf_hub_url(self.model, file, revision=self.commit)
        response = http_backoff("GET", url, headers=headers, follow_redirects=True)
        hf_raise_for_status(response)
        data = response.content
        # A server without ranges answers with the whole file.
        return data if response.status_code == 206 else data[start : start + length]
