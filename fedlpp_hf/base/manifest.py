# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The directory of a base: its shards, its scrubbed configuration, and the manifest that says what is in it."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


BASE_MANIFEST = "base_manifest.json"
FORMAT_VERSION = 1
_SETTINGS = ("format_version", "bits", "block_size", "double_quant", "embedding_bits", "skip_modules", "architecture")
# Copied next to the weights where the full model has them. A README names its owner; it stays.
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
_OWNERS_KEYS = ("name_or_path", "_commit_hash", "auto_map", "_file", "_path", "_dir")


@contextmanager
def new_base_directory(output_dir: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to write into that becomes `output_dir` when the block ends, or is removed when it fails.

    Raises:
        ValueError: if `output_dir` exists, unless it is a base and `overwrite` is set.
    """
    if output_dir.exists() and not overwrite:
        raise ValueError(f"`{output_dir}` exists; pass overwrite=True to replace the base in it.")
    if output_dir.exists() and not (output_dir / BASE_MANIFEST).is_file():
        raise ValueError(f"`{output_dir}` has no `{BASE_MANIFEST}`, so it is not a base; it is not overwritten.")
    partial = output_dir.parent / f".{output_dir.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        yield partial
        old = partial.with_suffix(".old")
        if output_dir.exists():
            output_dir.rename(old)
        partial.rename(output_dir)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class ShardWriter:
    """Writes tensors into safetensors files of at most `max_shard_size` bytes (or one tensor), named as transformers
    does, each while the tensors of the next one come in.

    As a context manager; then `finish` names the files, and `digests` are their sha256.
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
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.pending and self.pending_size + size > self.max_shard_size:
            self._flush()
        self.pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.pending_size += size
        self.total_size += size

    def finish(self) -> None:
        weight_map: dict[str, str] = {}
        for number, (names, saved) in enumerate(zip(self.shards, self.saved, strict=True), 1):
            file = f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            file = "model.safetensors" if len(self.shards) == 1 else file
            self.digests[file] = saved.result()
            (self.directory / f"shard-{number}").rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        if len(self.shards) > 1:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            write_json(self.directory / "model.safetensors.index.json", index)

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


def write_json(path: Path, value: Any) -> None:
    """Write `value` with sorted keys, so that equal values give equal files."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_companions(source: Path, config: dict[str, Any], directory: Path, secrets: Sequence[str]) -> None:
    """Write the configuration, and the tokenizer's or processor's files of `source`, without what tells of the owner."""
    write_json(directory / "config.json", scrub(config, secrets))
    for path in (source / name for name in _COMPANIONS):
        if path.is_file() and path.name.endswith("config.json"):
            write_json(directory / path.name, scrub(json.loads(path.read_text(encoding="utf-8")), secrets))
        elif path.is_file():
            shutil.copyfile(path, directory / path.name)


def scrub(value: Any, secrets: Sequence[str]) -> Any:
    """JSON without the keys that hold paths or names, and without the strings that contain one of `secrets`."""

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


def seal_base(directory: Path, manifest: dict[str, Any], digests: dict[str, str]) -> None:
    """Add the files, whose sha256 are those in `digests` as far as known, and the fingerprint to `manifest`; write it."""
    manifest["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": digests.get(path.name) or hash_file(path)}
        for path in _files(directory)
    }
    manifest["fingerprint"] = compute_fingerprint(manifest)
    write_json(directory / BASE_MANIFEST, manifest)


def compute_fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 over the names and digests of the files and the settings of the quantization."""
    content = {key: manifest[key] for key in _SETTINGS}
    content["files"] = {name: file["sha256"] for name, file in manifest["files"].items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _files(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.iterdir()) if path.is_file() and path.name != BASE_MANIFEST]


def read_manifest(base_dir: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a base.

    Raises:
        ValueError: if there is none, or it is damaged or of another format.
    """
    path = Path(base_dir) / BASE_MANIFEST
    if not path.is_file():
        raise ValueError(
            f"`{base_dir}` has no `{BASE_MANIFEST}`; expected the directory of a quantized base, as clients may load "
            "nothing else. The owner makes one with `export_base(full_model, output_dir)`."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, fingerprint = manifest["format_version"], manifest["fingerprint"]
        intact = version != FORMAT_VERSION or fingerprint == compute_fingerprint(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`{path}` can't be read ({error!r}); copy the base again.") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"`{path}` has format {version}; this version of fedlpp_hf reads {FORMAT_VERSION}.")
    if not intact:
        raise ValueError(f"`{path}` does not match its own fingerprint; copy the base again.")
    return manifest


def check_base(base_dir: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a base whose files are all there, unchanged, and the only ones.

    Raises:
        ValueError: naming the file that is not as the manifest says.
    """
    base_dir, manifest = Path(base_dir), read_manifest(base_dir)
    present = {path.name for path in _files(base_dir) if path.name != "README.md" and not path.name.startswith(".")}
    extra = sorted(present - set(manifest["files"]))
    if extra:
        raise ValueError(f"`{base_dir}` has `{extra[0]}`, which its manifest does not list. Remove it.")
    for name, file in manifest["files"].items():
        if name not in present:
            raise ValueError(f"`{base_dir}` has no `{name}`; copy the base again.")
        if hash_file(base_dir / name) != file["sha256"]:
            raise ValueError(
                f"`{base_dir / name}` is not the exported file (its sha256 differs); copy the base again."
            )
    return manifest
