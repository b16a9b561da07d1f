# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Describe what a base, an adapter or a federation contains and what of it leaves the owner, in lines to print.

It needs no torch: of adapters it reads the headers.
"""

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.manifest import BASE_MANIFEST
from ..config.groups import FederationOptions
from ..config.metrics import MetricChoice
from ..config.options import card_labels
from ..merge.foreign_config import check_patterns
from ..server.store import FEDERATION_DIR, FEDERATION_FILE, RoundStore
from ..tensors.codebooks import BITS, packed_size
from ..tensors.headers import TensorRange
from ..tensors.lora import LoraFactors, lora_factors, read_config, read_shapes
from ..tensors.names import ADAPTER_CONFIG
from .base_inspection import describe_base, format_shape, shorten
from .tables import format_bytes, format_table
from .text import find_warnings, list_rounds


if TYPE_CHECKING:
    from ..merge.report import MergeReport

SCALE_BYTES = 4


def describe_directory(directory: str | os.PathLike, tensors: bool = False, verify: bool = False) -> list[str]:
    """Describe a base, a federation or an adapter, whichever the directory is.

    Args:
        directory: the base, the adapter, or the federation's `output_dir`.
        tensors: list every tensor.
        verify: compare every file of a base with its manifest.

    Raises:
        ValueError: if the directory is something else, or damaged.
    """
    kind, path = find_kind(directory, verify)
    if kind == "base":
        return describe_base(path, tensors, verify)
    if kind == "adapter":
        return describe_adapter(path, tensors)
    lines = describe_federation(path)
    published = (path / ADAPTER_CONFIG).is_file()
    return [*lines, "", *describe_adapter(path, tensors)] if published else lines


def find_kind(directory: str | os.PathLike, verify: bool = False) -> tuple[str, Path]:
    """Whether a directory is a `base`, a `federation` or an `adapter`, and where that is: `_federation` is its parent's.

    Raises:
        ValueError: if the directory is something else, or `verify` is asked of what is no base.
    """
    path = Path(directory)
    if (path / BASE_MANIFEST).is_file():
        return "base", path
    if verify:
        raise ValueError(f"`{directory}` is not a base; --verify compares a base with its manifest. Leave it out.")
    if path.name == FEDERATION_DIR:
        path = path.parent
    if (path / FEDERATION_DIR / FEDERATION_FILE).is_file():
        return "federation", path
    if (path / ADAPTER_CONFIG).is_file():
        return "adapter", path
    if not path.is_dir():
        raise ValueError(f"`{directory}` is not a directory.")
    raise ValueError(
        f"`{directory}` is not a base (no {BASE_MANIFEST}), adapter (no {ADAPTER_CONFIG}) or federation (no "
        f"{FEDERATION_DIR}/{FEDERATION_FILE})."
    )


def read_lora(
    directory: str | os.PathLike,
) -> tuple[dict[str, TensorRange], dict[str, Any], dict[str, LoraFactors]]:
    """Read what an adapter is: its tensors without their values, its configuration, and the factors by target.

    Raises:
        ValueError: if it can't be read, is no LoRA, or has patterns that may never end.
    """
    config = read_config(directory)
    adapter = read_shapes(directory)
    fields = {name: config.get(name) for name in ("rank_pattern", "alpha_pattern")}
    patterns = [(name, key) for name, value in fields.items() if isinstance(value, dict) for key in value]
    try:
        if patterns:  # the adapter may be anybody's
            check_patterns(patterns, list(lora_factors(adapter, {"r": 1, "lora_alpha": 1})))
        return adapter, config, lora_factors(adapter, config)
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"`{directory}/{ADAPTER_CONFIG}` is not a configuration of LoRA ({error!r}).") from error


def describe_adapter(directory: str | os.PathLike, tensors: bool = False) -> list[str]:
    """Describe an adapter's targets and size, and the bytes of its broadcast at each number of bits.

    Args:
        directory: a PEFT repository.
        tensors: list every tensor.

    Raises:
        ValueError: if it can't be read.
    """
    adapter, config, factors = read_lora(directory)
    others = sorted(set(adapter) - {key for f in factors.values() for key in (f.key_a, f.key_b)})
    counts = [math.prod(tensor.shape) for tensor in adapter.values()]
    values, stored = sum(counts), sum(tensor.stop - tensor.start for tensor in adapter.values())
    scales = sorted({factor.scale for factor in factors.values()})
    lines = [
        f"{config.get('peft_type', 'PEFT')} adapter: rank {config.get('r')}, alpha {config.get('lora_alpha')}, "
        f"{len(factors)} targets (scale {', '.join(f'{scale:g}' for scale in scales)})"
        + (f", and {len(others)} whole tensors: {shorten(others)}" if others else ""),
        f"{len(adapter)} tensors, {values:,} parameters, {format_bytes(stored)}",
    ]
    if name := config.get("base_model_name_or_path"):
        lines.append(f"WARNING: its configuration names the model `{name}`, which a client would see.")
    if tensors:
        rows = [
            [key, format_shape(t.shape), t.dtype_name, format_bytes(t.stop - t.start)] for key, t in adapter.items()
        ]
        lines += ["", *format_table([["tensor", "shape", "dtype", "bytes"], *rows])]
    block_size = FederationOptions.adapter_block_size
    sizes = [sum(packed_size(bits, n) + SCALE_BYTES * math.ceil(n / block_size) for n in counts) for bits in BITS]
    table = [["bits", *map(str, BITS), "32"], ["bytes", *map(format_bytes, [*sizes, 4 * values])]]
    return [*lines, "", f"To broadcast it to one client, in blocks of {block_size}:", *format_table(table)]


def describe_federation(output_dir: str | os.PathLike) -> list[str]:
    """Describe a federation's options and its committed rounds, with the report's warnings.

    Raises:
        ValueError: if its state on disk is damaged.
    """
    store = RoundStore(output_dir)
    federation, records = store.read(), store.records()
    config = federation["config"]
    names = [name for name in card_labels(FederationOptions) if name != "num_rounds"]  # which is in the first line
    shown = [f"{name}={config[name]}" for name in names if config.get(name) not in (None, -1)]
    lines = [
        f"Federation {federation['federation_id']}: {max(len(records) - 1, 0)} of {config['num_rounds']} rounds committed, "
        f"{len(federation['clients'])} clients",
        f"base {federation['base_fingerprint']}",
        ", ".join(shown),
    ]
    if not records:
        return [*lines, "No round is committed."]
    choice = MetricChoice.of(config)
    down, up = (sum(record[way] for record in records) for way in ("bytes_down", "bytes_up"))
    lines += [
        "",
        *format_table(list_rounds(records, choice)),
        "",
        f"{format_bytes(down)} to clients, {format_bytes(up)} from clients in all.",
    ]
    if (store.root / "base" / BASE_MANIFEST).is_file():
        lines.append(f"The clients' base: fedlpp-hf inspect {store.root / 'base'}")
    return lines + [
        f"WARNING: {text}" for text in find_warnings(records[0]["metrics"], records[-1]["metrics"], choice)
    ]


def describe_merge(report: "MergeReport", layers: bool = False) -> list[str]:
    """Describe what a merge did.

    Args:
        report: the merge's.
        layers: list the norm of every update, and its ratio to the base's error if that is known.
    """
    done = "verified" if report.verified else "not verified"
    lines = [
        f"Merged into {report.output_dir}: {len(report.layers)} tensors updated, {len(report.replaced)} replaced, "
        f"{len(report.added)} added ({done})",
        f"{format_bytes(report.bytes_rewritten)} rewritten, {format_bytes(report.bytes_copied)} copied, "
        f"{report.seconds:.1f} s",
    ]
    if report.through_peft:
        lines.append(f"PEFT merged it in memory, because {report.through_peft}.")
    if report.base_weight:
        lines.append(f"Merged into W − {report.base_weight:g}·E, E = W − Q(W).")
    ratios = [layer.ratio for layer in report.layers if layer.ratio is not None]
    if ratios:
        lines.append(f"The base's error is {min(ratios):.2f} to {max(ratios):.2f} times the update, ‖W − Q(W)‖/‖ΔW‖.")
    if layers:
        rows = [
            [layer.parameter, f"{layer.update_norm:.4g}", "" if layer.ratio is None else f"{layer.ratio:.3g}"]
            for layer in report.layers
        ]
        lines += ["", *format_table([["tensor", "‖ΔW‖", "‖W − Q(W)‖/‖ΔW‖"], *rows])]
    return lines
