# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The manifest of a base: what is in it, and whether its files are those that were exported.

It needs no torch, so that `fedlpp-hf inspect` answers at once.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..tensors.atomic import hash_file
from .contents import check_link, check_types, list_base_files, read_json


BASE_MANIFEST = "base_manifest.json"
FORMAT_VERSION = 3
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json")
_OF_A_COPY = ("fingerprint", "copy", "files")  # the rest of a manifest is the same in every copy


def read_manifest(base_dir: str | os.PathLike) -> dict[str, Any]:
    """Read the manifest of a base.

    Raises:
        ValueError: if there is none, or it is damaged or has another format.
    """
    path = Path(base_dir) / BASE_MANIFEST
    if not path.is_file():
        raise ValueError(
            f"`{base_dir}` has no `{BASE_MANIFEST}`; expected the directory of a quantized base, as clients may load "
            "nothing else. The owner makes one with `export_base(full_model, output_dir)`."
        )
    try:
        manifest = read_json(check_link(path.parent, path))
        version, fingerprint = manifest["format_version"], manifest["fingerprint"]
        computed = _compute_fingerprint(manifest), _compute_copy(manifest)
        intact = version != FORMAT_VERSION or (fingerprint, manifest["copy"]) == computed
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`{path}` can't be read ({error!r}); copy the base again.") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"`{path}` has format {version}; this version of fedlpp_hf reads {FORMAT_VERSION}.")
    check_types(manifest)
    if not intact:
        raise ValueError(f"`{path}` does not match its own fingerprint; copy the base again.")
    return manifest


def check_base(base_dir: str | os.PathLike) -> dict[str, Any]:
    """Check that the files of a base are all there, unchanged, and the only ones. Returns the manifest.

    Raises:
        ValueError: naming the file that differs from the manifest.
    """
    base_dir, manifest = Path(base_dir), read_manifest(base_dir)
    present = {place.as_posix() for place in list_base_files(base_dir)}
    extra = sorted(present - set(manifest["files"]))
    if extra:
        raise ValueError(f"`{base_dir}` has `{extra[0]}`, which its manifest does not list. Remove it.")
    for name, file in manifest["files"].items():
        if name not in present:
            raise ValueError(f"`{base_dir}` has no `{name}`; copy the base again.")
        path = check_link(base_dir, base_dir / name)
        if path.stat().st_size != file["bytes"] or hash_file(path) != file["sha256"]:
            raise ValueError(
                f"`{base_dir / name}` is not the exported file (its size or sha256 differs); copy the base again."
            )
    return manifest


def describe_base(base_dir: str | os.PathLike) -> dict[str, Any]:
    """Read the manifest of a base, and add what is in full precision and how large the files are.

    `full_precision` lists these tensors' entries, the largest first; `file_bytes` is the size of all files.
    """
    manifest = read_manifest(base_dir)
    exact = [entry for entry in manifest["tensors"] if entry["kind"] == "full_precision"]
    return manifest | {
        "full_precision": sorted(exact, key=lambda entry: -entry["bytes"]),
        "file_bytes": sum(file["bytes"] for file in manifest["files"].values()),
    }


def base_fingerprint(base: Any) -> str:
    """The fingerprint that all copies of a base share: of its directory, or of a model that was loaded from there.

    It is read from the manifest; [`check_base`] proves that the files fit it.

    Raises:
        ValueError: if the model was not loaded from a base.
    """
    if isinstance(base, str | os.PathLike):
        return read_manifest(base)["fingerprint"]
    fingerprint = getattr(base, "base_fingerprint", None)
    directory = getattr(getattr(base, "config", None), "_name_or_path", "")
    return str(fingerprint or read_manifest(directory)["fingerprint"])


def write_manifest(directory: Path, manifest: dict[str, Any], digests: dict[str, str]) -> None:
    """Add the files and the fingerprint to `manifest`, and write it. `digests` are the sha256 known already, by file."""
    manifest["files"] = {
        place.as_posix(): {
            "bytes": (directory / place).stat().st_size,
            "sha256": digests.get(place.as_posix()) or hash_file(directory / place),
        }
        for place in list_base_files(directory)
    }
    manifest["fingerprint"], manifest["copy"] = _compute_fingerprint(manifest), _compute_copy(manifest)
    write_json(directory / BASE_MANIFEST, manifest)


def write_json(path: Path, value: Any) -> None:
    """Write `value` with sorted keys, so that equal values give equal files."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _compute_fingerprint(manifest: dict[str, Any]) -> str:
    """The sha256 of what all copies of a base have in common: a task names it, whatever the marks of a client's copy."""
    content = {key: value for key, value in manifest.items() if key not in _OF_A_COPY}
    content["files"] = {
        name: file["sha256"] for name, file in manifest["files"].items() if not name.endswith(_WEIGHT_FILES)
    }
    return _hash(content)


def _compute_copy(manifest: dict[str, Any]) -> str:
    """The sha256 of the names and digests of all files: it identifies one copy."""
    return _hash({"files": {name: file["sha256"] for name, file in manifest["files"].items()}})


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
