# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Describe what clients receive with a base, in lines to print. It needs no torch, so that the answer comes at once."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..base.manifest import check_base, read_manifest
from ..base.manifest import describe_base as summarize_manifest
from .tables import format_bytes, format_table


_KINDS = {
    "linear4bit": "4-bit weights",
    "linear8bit": "8-bit weights",
    "codebook": "floats of few values",
    "full_precision": "full precision",
}
_LISTED = 5


def describe_base(base_dir: str | os.PathLike, tensors: bool = False, verify: bool = False) -> list[str]:
    """Describe what a client receives with a base: bits per weight and bytes of each kind of tensor, and exact tensors.

    Args:
        base_dir: directory of the base.
        tensors: list every tensor instead of the kinds.
        verify: compare every file with the manifest.

    Raises:
        ValueError: if it is not a base, or with `verify` if a file differs from the manifest.
    """
    manifest = check_base(base_dir) if verify else read_manifest(base_dir)
    entries, totals = manifest["tensors"], manifest["totals"]
    scales = "quantized scales" if manifest["double_quant"] else f"blocks of {manifest['block_size']}"
    lines = [
        f"Base of {manifest['architecture']}: {manifest['bits']} bits, {scales}; embeddings {manifest['embedding_bits']} "
        "bits",
        f"fingerprint {manifest['fingerprint']}" + (" (every file checked)" if verify else ""),
        "",
    ]
    header = ["tensors", "count", "parameters", "bits each", "information", "on disk"]
    if tensors:
        rows = [_row(f"{e['name']} {format_shape(e['shape'])}", [e]) for e in entries]
    else:
        groups = {kind: [e for e in entries if e["kind"] == kind] for kind in _KINDS}
        rows = [_row(_KINDS[kind], group) for kind, group in groups.items() if group]
    lines += format_table([header, *rows, _row("all", entries)])
    files = sum(file["bytes"] for file in manifest["files"].values())
    lines += [
        "",
        f"Each client is sent at most {format_bytes(totals['information_bytes'])} once (packed; {format_bytes(files)} of "
        "files on disk).",
    ]
    exact = sorted((e for e in entries if e["kind"] == "full_precision"), key=lambda e: -e["bytes"])
    names = [f"{e['name']} ({format_bytes(e['bytes'])})" for e in exact]
    if calibration := manifest.get("calibration"):
        missed = calibration["not_reached"]
        lines.append(
            f"Calibrated on {calibration['rows']} rows of the owner"
            + (f"; not reached, so rounded to the nearest: {shorten(missed)}" if missed else ".")
        )
    lines.append(
        f"In full precision: {format_bytes(totals['full_precision_bytes'])}: {shorten(names)}"
        if exact
        else "Nothing is in full precision."
    )
    if manifest["full_precision_linears"]:
        lines.append(f"WARNING: linear layers in full precision: {shorten(manifest['full_precision_linears'])}")
    for key, label in (("initialized_by_clients", "Initialized by clients"), ("left_out", "Left out")):
        if manifest[key]:
            lines.append(f"{label}: {shorten(manifest[key])}")
    return lines


def summarize_base(base_dir: str | os.PathLike, tensors: bool = False, verify: bool = False) -> dict[str, Any]:
    """The same as JSON values: the manifest, `full_precision` (the largest first), `file_bytes`, `verified`.

    Args:
        base_dir: directory of the base.
        tensors: keep the entries of all tensors and files.
        verify: compare every file with the manifest.

    Raises:
        ValueError: if it is not a base, or with `verify` if a file differs from the manifest.
    """
    if verify:
        check_base(base_dir)
    values = summarize_manifest(base_dir)
    if not tensors:
        values = {key: value for key, value in values.items() if key not in ("tensors", "files")}
    return {"kind": "base", **values, "verified": verify}


def _row(label: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    parameters = sum(math.prod(entry["shape"]) for entry in entries)
    information = sum(entry["information_bytes"] for entry in entries)
    stored = sum(entry["bytes"] for entry in entries)
    bits = f"{information * 8 / max(parameters, 1):.2f}"
    return [label, str(len(entries)), f"{parameters:,}", bits, format_bytes(information), format_bytes(stored)]


def format_shape(shape: Sequence[int]) -> str:
    """`2×3`."""
    return "×".join(map(str, shape)) or "scalar"


def shorten(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
