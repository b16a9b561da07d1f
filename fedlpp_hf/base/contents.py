# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a checkpoint or a base from elsewhere may hold: transformers would follow links, and what configurations ask for.

It needs no torch, so that `fedlpp-hf inspect` answers at once.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


# Copied next to the weights where the full model has them. A README names its owner; it stays.
TOKENIZER_FILES = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja", "chat_template.json",
]  # fmt: skip
COMPANIONS = [
    "generation_config.json", *TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json", "modules.json",
    "sentence_bert_config.json", "config_sentence_transformers.json",
]  # fmt: skip
_CONFIG = "config.json"
# Weights of transformers' names, and what describes the modules around a sentence model's transformer.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_FOLDER_CONFIG = re.compile(r"\w[\w.-]*/config\.json")
# Keys by which a configuration names code to run or another place to read from.
_REACHING_OUT = ("auto_map", "custom_generate", "trust_remote_code", "custom_pipelines")
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
_COUNTS = re.compile(r"layers?$|depths?$|experts?$|(^|_)layers?_|_blocks$")  # of modules to build
_MORE_THAN_TENSORS = 2000
_MOST_LABELS = 1_000_000  # each becomes an entry of a dictionary
_MOST_JSON_BYTES = 48 << 20  # which may take twenty times as much memory; the manifest of 100,000 tensors has 45 MB
# Transformers and PEFT take names of modules for regular expressions. Without these signs a pattern has one way to match, and takes no
# longer than its text; with many of them it may never end.
PATTERN_SIGNS = re.compile(r"[*+{?|]")
_TENSOR_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str, "kind": str, "shape": list, "source_dtype": str, "dtype": str, "bits": (int, str), "block_size": int,
    "information_bytes": int, "information_bits": (int, float), "bytes": int, "digest": str,
}  # fmt: skip
_MANIFEST_TYPES: dict[str, type | tuple[type, ...]] = {
    "bits": (int, str), "block_size": int, "double_quant": bool, "embedding_bits": (int, str), "skip_modules": list,
    "architecture": str, "full_precision_linears": list, "initialized_by_clients": list, "left_out": list, "tensors": list,
    "totals": dict, "files": dict, "fingerprint": str, "copy": str,
}  # fmt: skip


def check_link(directory: Path, path: Path) -> Path:
    """`path`, unless it leads out of `directory`: a cloned repository may link to any file of this machine.

    The Hub's cache keeps files beside its directories, in `blobs`; links to there are its own.

    Raises:
        ValueError: naming the link.
    """
    root, target = directory.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs"
    if target.is_relative_to(root) or (root.parent.name == "snapshots" and target.is_relative_to(blobs)):
        return path
    raise ValueError(
        f"`{path}` is a link out of its directory, to `{target}`. What it points to could be any file of yours, and would be "
        "read or passed on. If it is meant, put the file itself there."
    )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: if it is no JSON, nested without end, or too large to be read.
    """
    try:
        if (size := path.stat().st_size) > _MOST_JSON_BYTES:
            raise ValueError(f"it has {size} bytes; expected at most {_MOST_JSON_BYTES}")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` can't be read ({type(error).__name__}: {error}).") from error


def list_base_files(directory: Path) -> Iterator[Path]:
    """The files of a base, by their paths in it, without its manifest, its README and what begins with a dot."""
    for path in sorted(directory.rglob("*")):
        place = path.relative_to(directory)
        if any(part.startswith(".") for part in place.parts) or place.name in ("README.md", "base_manifest.json"):
            continue
        if path.is_file() or path.is_symlink():
            yield place


def check_file_name(name: str) -> None:
    """Refuse a file that no base has: weights in other formats, adapters, code, or a path out of the directory.

    Raises:
        ValueError: naming it.
    """
    if name == _CONFIG or name in COMPANIONS or _WEIGHTS.fullmatch(name) or _FOLDER_CONFIG.fullmatch(name):
        return
    raise ValueError(
        f"The base has `{name}`, which is no file of a base: expected safetensors, configurations and a tokenizer's files. "
        "Nothing of it was read; ask the owner for another copy."
    )


def check_types(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest with a field of another type.

    Raises:
        ValueError: naming the field.
    """
    _check_fields(manifest, _MANIFEST_TYPES, "the manifest")
    for name in ("skip_modules", "full_precision_linears", "initialized_by_clients", "left_out"):
        if not all(isinstance(value, str) for value in manifest[name]):
            raise ValueError(f"`{name}` of the manifest holds something that is no name.")
    for entry in manifest["tensors"]:
        if not isinstance(entry, dict):
            raise ValueError(f"`tensors` of the manifest holds {entry!r:.60}; expected one mapping a tensor.")
        _check_fields(entry, _TENSOR_TYPES, f"the tensor {entry.get('name')!r:.80}")
        if not all(type(size) is int and 0 <= size < 2**40 for size in entry["shape"]):
            raise ValueError(f"`shape` of {entry['name']!r:.80} is {entry['shape']!r:.60}; expected sizes.")
    for name, file in manifest["files"].items():
        check_file_name(name)
        _check_fields(file, {"bytes": int, "sha256": str}, f"the file {name!r}")
        if name.endswith("config.json") and file["bytes"] > _MOST_JSON_BYTES:
            raise ValueError(
                f"The manifest gives `{name}` {file['bytes']} bytes; expected at most {_MOST_JSON_BYTES}."
            )
        if len(file) != 2:
            raise ValueError(
                f"The manifest says more of the file {name!r} than its size and sha256: {list(file)[:5]!r:.80}."
            )


def check_configurations(base_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse configurations of a base that ask for code, for kernels from elsewhere, or for more modules than it can have.

    Args:
        base_dir: Of the base.
        manifest: Of the base.

    Raises:
        ValueError: naming file and key.
    """
    for name in manifest["files"]:
        if not name.endswith(".json") or name.endswith((".index.json", "tokenizer.json", "vocab.json")):
            continue
        path = check_link(base_dir, base_dir / name)
        for key, value in _walk(read_json(path), name):
            if key in _REACHING_OUT and value:
                raise ValueError(f"`{path}` has `{key}`: it asks for code of others, which is never run.")
            if key in _ATTENTION and isinstance(value, str) and not value.isidentifier():
                raise ValueError(f"`{path}` has {key}={value!r:.80}: it asks for a kernel from elsewhere.")
            most = len(manifest["tensors"]) + _MORE_THAN_TENSORS
            if _COUNTS.search(key) and isinstance(value, int) and value > most:
                raise ValueError(f"`{path}` has {key}={value}, and the base has {len(manifest['tensors'])} tensors.")
            if key == "num_labels" and isinstance(value, int) and value > _MOST_LABELS:
                raise ValueError(f"`{path}` has num_labels={value}; expected at most {_MOST_LABELS}.")
            if name == "generation_config.json" and isinstance(value, dict) and not _are_numbers(key, value):
                raise ValueError(f"`{path}` has {key}={value!r:.80}; expected numbers and names.")
    config = read_json(base_dir / _CONFIG)
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "bitsandbytes":
        raise ValueError(
            f"`{base_dir / _CONFIG}` has quant_method={method!r:.60}; a base is quantized with bitsandbytes. Ask the owner for "
            "another copy."
        )
    for key, value in _walk(quantization, "quantization_config"):
        if isinstance(value, str) and PATTERN_SIGNS.search(value):
            raise ValueError(f"`{base_dir / _CONFIG}` has {key}={value!r:.80}, a regular expression; expected names.")


def _are_numbers(key: str, value: Mapping[str, Any]) -> bool:
    """Whether a mapping holds ids of tokens, as Whisper's languages, and not a configuration of something else."""
    return not value or (not key.endswith("_config") and all(type(part) is int for part in value.values()))


def _walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """All values of JSON with the keys that they are under."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield name, part
            yield from _walk(part, name)
    elif isinstance(value, list):
        for part in value:
            yield key, part
            yield from _walk(part, key)


def _check_fields(values: Any, types: Mapping[str, Any], what: str) -> None:
    for name, expected in types.items():
        value = values.get(name) if isinstance(values, Mapping) else values
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise ValueError(f"`{name}` of {what} is {value!r:.60}; the base was made by something else, or damaged.")
