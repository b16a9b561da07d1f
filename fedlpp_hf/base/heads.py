# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Parameters that a checkpoint does not have: new heads, poolers and the like, and one start of them for everybody.

transformers draws them at random in each process. The owner's model and each client's base would then differ for ever, or
start apart. Here they follow from a seed and their names.
"""

import copy
import hashlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel


DEFAULT_SEED = 42  # of TrainingArguments


def list_new_parameters(model: nn.Module) -> list[str]:
    """List the parameters that the checkpoint of a loaded model does not have, by name.

    The list is empty for a model that was built and not loaded. The names hold after the model was moved or cast.
    """
    # transformers marks what it finds in a checkpoint, and initializes the rest by that mark. bitsandbytes' weights lose
    # it on their way to a GPU; they are of a class of their own, and never new.
    plain = {name: p for name, p in model.named_parameters() if type(p) is nn.Parameter and p.is_floating_point()}
    known = {name for name, parameter in plain.items() if getattr(parameter, "_is_hf_initialized", False)}
    return [name for name in plain if name not in known] if known else []


@torch.no_grad()
def initialize_new_parameters_(model: PreTrainedModel, seed: int, dtype: torch.dtype | None = None) -> list[str]:
    """Initialize what the checkpoint of a loaded model does not have, as a function of `seed` and of names alone.

    The model's own `_init_weights` draws each module in float32 on the CPU, so that models of other dtypes, devices and
    quantizations start at the same values. The random numbers of this process are not touched.

    Args:
        model: The model as `from_pretrained` returned it.
        seed: Of the federation.
        dtype: What these parameters become; by default they keep theirs.

    Returns:
        Their names.
    """
    names = list_new_parameters(model)
    for place, module in _find_roots(model, names):
        drawn = _draw(model, place, module, seed)
        for name, parameter in module.named_parameters(prefix=place):
            if name in names:
                parameter.data = drawn[name].to(parameter.device, dtype or parameter.dtype)
    return names


def _find_roots(model: nn.Module, names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that are new as a whole, and those with some new parameter beside others."""
    new, left = set(names), set(names)

    def is_new(module: nn.Module, place: str) -> bool:
        found = [name for name, _ in module.named_parameters(prefix=place)]
        return bool(found) and new.issuperset(found)

    for place, module in model.named_modules():  # parents come first
        own = {name for name, _ in module.named_parameters(prefix=place, recurse=False)}
        if is_new(module, place):
            own = {name for name, _ in module.named_parameters(prefix=place)}
        if own & left:
            left -= own
            yield place, module


def _draw(model: PreTrainedModel, place: str, module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """All parameters of a module at their initialization, by full name."""
    fresh = copy.deepcopy(module).to("cpu", torch.float32)  # the copies have no marks, so that all is drawn
    parts = list(fresh.named_modules(prefix=place))
    with torch.random.fork_rng(devices=[]):
        for name, part in reversed(parts):  # children first, as transformers does
            torch.manual_seed(_derive_seed(seed, name))
            _find_owner(model, name)._init_weights(part)
    return dict(fresh.named_parameters(prefix=place))


def _find_owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost pretrained model around a module: it knows how the module is initialized."""
    owner, module = model, model
    for part in name.split(".") if name else []:
        module = getattr(module, part)
        owner = module if isinstance(module, PreTrainedModel) else owner
    return owner


def _derive_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
