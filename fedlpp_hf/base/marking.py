# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Copies of a base that tell whose they are: the owner's key file, and tracing a suspect back to a client."""

import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..privacy.marks import Mark, Trace, Tracer
from ..tensors.atomic import write_atomically
from ..tensors.codebooks import codebook, nf4_subset
from ..tensors.quantization import find_between_levels, round_to_levels
from .full_model import FullModel
from .modules import build_meta_model, default_skip_modules, find_quantized, make_quantization_config
from .quantize import MARK_TOLERANCE
from .suspect import SuspectReader
from .tensor_plan import plan_tensors


_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class MarkKey:
    """What the owner needs to make marked copies and to trace them. Whoever reads it can remove the marks.

    Args:
        secret: In hexadecimal.
        full_model: The full model that the copies are made of.
        settings: Arguments of [`export_base`] that decide which weights are marked.
        clients: Ids of the clients that have a copy.
    """

    secret: str
    full_model: str
    settings: dict[str, Any]
    clients: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: str | os.PathLike) -> "MarkKey":
        """Read a key file.

        Raises:
            ValueError: if it is missing, damaged, or readable by other users.
        """
        path = Path(file)
        try:
            mode = path.stat().st_mode
            key = cls(**json.loads(path.read_text(encoding="utf-8")))
            if len(bytes.fromhex(key.secret)) != _SECRET_BYTES:
                raise ValueError("its secret has the wrong length")
            names = [key.full_model, *key.clients]
            if (
                not isinstance(key.clients, list)
                or not isinstance(key.settings, dict)
                or not all(isinstance(name, str) for name in names)
            ):
                raise ValueError("it holds other things than names and settings")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"The key `{file}` can't be read ({error}). `fedlpp-hf quantize --mark CLIENT --key FILE` makes one."
            ) from error
        if mode & 0o077:
            raise ValueError(
                f"Other users can read the key `{file}`; whoever has it can remove the marks. chmod 600 it."
            )
        return key

    def write(self, file: str | os.PathLike) -> None:
        """Write the key file, for its user alone."""
        before = os.umask(0o177)
        try:
            write_atomically(Path(file), (json.dumps(asdict(self), indent=2) + "\n").encode())
        finally:
            os.umask(before)

    def mark_for(self, client: str) -> Mark:
        """The mark of a client's copy."""
        return Mark(bytes.fromhex(self.secret), client)


def prepare_mark(
    file: str | os.PathLike, client: str, full_model: str | os.PathLike, settings: dict[str, Any]
) -> Mark:
    """The mark for `client`, whose id the key file gets; a new key file is made where there is none.

    Args:
        file: The key file.
        client: The client's id.
        full_model: The full model.
        settings: Arguments of [`export_base`] that decide which weights are marked.

    Raises:
        ValueError: if the key belongs to another full model, or to copies with other settings.
    """
    path, model = Path(file), _name_of(full_model)
    if not client:
        raise ValueError("The client's id is empty; a mark needs a name to trace it back to.")
    if path.exists():
        key = MarkKey.read(path)
        if (key.full_model, key.settings) != (model, settings):
            raise ValueError(
                f"The key `{file}` is for copies of `{key.full_model}` with {key.settings}; given were `{model}` and "
                f"{settings}. Copies can be traced together only if they differ in their marks alone: use the same "
                "settings, or another key file."
            )
    else:
        key = MarkKey(secrets.token_hex(_SECRET_BYTES), model, settings)
    if client not in key.clients:
        # Before the copy is made: one that nobody could trace must not exist.
        key = replace(key, clients=[*key.clients, client])
        key.write(path)
    return key.mark_for(client)


def trace_base(
    suspect: str | os.PathLike,
    key: MarkKey,
    full_model: str | os.PathLike | None = None,
    token: str | None = None,
) -> list[Trace]:
    """Find out whose copy a suspect was made of, the likeliest client first.

    The suspect may be a base, or a model in any floating dtype that came of one: with an adapter merged in, fine-tuned,
    requantized and restored, pruned, or put together of several copies.

    Args:
        suspect: A directory, or a name on the Hub.
        key: Of the owner.
        full_model: Where the full model is now, if it has moved.
        token: For the Hub.

    Raises:
        ValueError: if the suspect is of another architecture than the full model, or can't be read.
    """
    source = FullModel(full_model or key.full_model, token=token)
    tracer = Tracer(bytes.fromhex(key.secret), key.clients)
    reader = SuspectReader(suspect, token)
    bits, block_size = key.settings["bits"], key.settings["block_size"]
    levels = codebook(4)[list(nf4_subset(bits))]
    compared = 0
    for name, weight in _read_marked(source, key.settings):
        if not reader.has(name, weight.shape):
            continue
        compared += 1
        places, lower = find_between_levels(weight, levels, block_size, MARK_TOLERANCE)
        _, scales = round_to_levels(weight, levels, block_size, name=name)
        scales = scales[places // block_size]
        low, high = levels[lower.long()] * scales, levels[lower.long() + 1] * scales
        values = reader.read(name, weight.shape).reshape(-1)[places]
        tracer.add(name, _place_between(values, low, high))
    if not compared:
        raise ValueError(
            f"`{suspect}` has none of the full model's marked weights, by name and shape; it is of another architecture."
        )
    return list(tracer.results())


def _place_between(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> np.ndarray:
    """Where values stand between two levels: −1 at the lower, 1 at the upper, and what is beyond counts as there."""
    width = (high - low).clamp(min=1e-38)
    placed = ((values.float() - low) * 2 / width - 1).clamp(-1, 1)
    return placed.nan_to_num(0.0).double().numpy()


def _read_marked(source: FullModel, settings: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The full model's weights that copies have in 4-bit codes, as these store them: `(out, in)`."""
    config = source.read_config()
    model = build_meta_model(config, _find_class(settings["model_class"]))
    skip = settings["skip_modules"] or default_skip_modules(model)
    config.quantization_config = make_quantization_config(4, False, skip, source.dtype)
    quantized = find_quantized(model, config)
    for name, tensor in plan_tensors(model, source.shapes).read(source, model):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in quantized:
            yield name, tensor.T.contiguous() if quantized[module] else tensor


def _find_class(name: str | None) -> Any:
    import transformers

    return None if name is None else getattr(transformers, name)


def _name_of(full_model: str | os.PathLike) -> str:
    return str(Path(full_model).resolve()) if Path(full_model).is_dir() else str(full_model)
