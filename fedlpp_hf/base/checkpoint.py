# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Reading a full-precision checkpoint tensor by tensor, under the names that the model's parameters have."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The safetensors files of a model on disk or on the Hub, opened together and read one tensor at a time.

    Raises:
        ValueError: if there are no safetensors, or a file is missing or truncated.
    """

    def __init__(self, model: str | os.PathLike, revision: str | None = None, token: str | None = None):
        self.directory = Path(model)
        if not self.directory.is_dir():
            if str(model).count("/") > 1 or str(model).startswith((".", "~")):
                raise ValueError(f"`{model}` is no directory, nor a Hub id (`owner/name`).")
            # Not `*.bin`: a pickle runs code when it is opened, so it is not even downloaded.
            patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]
            ignore = ["*/*", "consolidated*"]
            self.directory = Path(
                snapshot_download(
                    str(model), revision=revision, token=token, allow_patterns=patterns, ignore_patterns=ignore
                )
            )
        # What must not appear in any file that leaves the owner. A bare name, as of a folder, could be any word.
        self.secrets = [str(self.directory.resolve())] + ([str(model)] if "/" in str(model) else [])
        self.stack = ExitStack()

    def __enter__(self) -> "Checkpoint":
        try:
            self._open()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _open(self) -> None:
        index = self.directory / WEIGHTS_INDEX
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        elif (self.directory / WEIGHTS).is_file():
            weight_map, files = {}, [WEIGHTS]
        else:
            pickles = sorted(p.name for p in self.directory.glob("*.bin"))
            hint = f"It has `{pickles[0]}`, a pickle, which is never opened. " if pickles else ""
            raise ValueError(
                f"`{self.directory}` has no `{WEIGHTS}` nor `{WEIGHTS_INDEX}`. {hint}Load the model with transformers "
                "and `save_pretrained` it: that writes safetensors."
            )
        self.readers = {}
        for file in files:
            if not (self.directory / file).is_file():
                raise ValueError(f"`{self.directory}` has no `{file}`, which its index names. Download it again.")
            try:
                self.readers[file] = self.stack.enter_context(safe_open(self.directory / file, "pt"))
            except SafetensorError as error:
                raise ValueError(f"`{self.directory / file}` can't be read ({error}). Is it truncated?") from error
        weight_map = weight_map or dict.fromkeys(self.readers[WEIGHTS].keys(), WEIGHTS)
        for name, file in weight_map.items():
            if name not in self.readers[file].keys():  # noqa: SIM118 (a safe_open is no dict)
                raise ValueError(f"`{self.directory / file}` has no `{name}`, which the index says it has.")
        self.files: dict[str, str] = weight_map

    @property
    def names(self) -> list[str]:
        return list(self.files)

    @property
    def dtype(self) -> torch.dtype:
        """That of the first floating point tensor."""
        return next((t.dtype for t in map(self.read, self.files) if t.is_floating_point()), torch.float32)

    def read(self, name: str) -> torch.Tensor:
        return self.readers[self.files[name]].get_tensor(name)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Which tensors of a checkpoint make which parameters of a model.

    `groups`: for each first parameter made, the conversion (None: just another name) and `(pattern, name in the
    checkpoint)` of its inputs. `missing`: parameters that the checkpoint has not. `left_out`: tensors of the checkpoint
    that the model has no place for.
    """

    groups: dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]]
    missing: list[str]
    left_out: list[str]

    def read(self, checkpoint: Checkpoint, model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters' names and values, one group of the checkpoint's tensors in memory at a time."""
        state = model.state_dict()
        for first, (converter, inputs) in self.groups.items():
            if converter is None:
                made: dict[str, Any] = {first: checkpoint.read(inputs[0][1])}
            else:
                converter = deepcopy(converter)
                for pattern, name in inputs:
                    converter.add_tensor(first, name, pattern, checkpoint.read(name))
                made = converter.convert(first, model=model, config=model.config)
            for name, tensor in made.items():
                tensor = tensor[0] if isinstance(tensor, list) else tensor
                if tensor.shape != state[name].shape:
                    raise ValueError(
                        f"`{name}` has shape {tuple(tensor.shape)} in the checkpoint; {type(model).__name__} has "
                        f"{tuple(state[name].shape)}. Does the configuration belong to these weights?"
                    )
                yield name, tensor


def plan_tensors(model: PreTrainedModel, names: Iterable[str]) -> TensorPlan:
    """Match a checkpoint's tensors to the model's parameters, by the rules that `from_pretrained` has for its class."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, tied = model.state_dict(), model.all_tied_weights_keys
    groups: dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]] = {}
    left_out, made = [], set()
    for source in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, state)
        if name not in state and source in state:
            name, pattern = rename_source_key(source, [], [], model.base_model_prefix, state)
        if name not in state:
            left_out.append(source)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        groups.setdefault(name, (converter, []))[1].append((pattern or "", source))
        made.add(name)
        if converter is not None:
            target = converter.target_patterns[0]
            made |= {name.replace(target, other) for other in converter.target_patterns}
    for copy, original in tied.items():
        if copy in made and original in made and copy in groups:  # a tied weight, stored twice
            left_out.extend(source for _, source in groups.pop(copy)[1])
        elif original in made:
            made.add(copy)
        elif copy in made:
            made.add(original)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return TensorPlan(groups, sorted(parameters - made), sorted(left_out))
