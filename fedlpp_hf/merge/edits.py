# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What an adapter does to each parameter of the model, as PEFT's own LoRA layers say."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora_layers
from peft.utils.other import ModulesToSaveWrapper

from ..tensors.lora import PREFIX
from .adapter_reader import AdapterReader
from .peft_models import NeedsPeft, is_duplicate, list_nearest, list_shapes
from .sizes import parameter_name


@dataclass(slots=True)
class Edit:
    """What adapters do to one parameter of the model, seen as a matrix; in three dimensions, each expert is a matrix.

    `key_a`, `key_b`: keys of the factors, ΔW = s·B·A, with one s in `scales` for each adapter; `transposed`: the parameter
    is stored `(in, out)`; `experts`: their number, where the factors of all are stacked; `magnitude`: DoRA's vector;
    `bias`: a vector to add, scaled; `value`: a tensor that replaces the parameter, before anything is added.
    """

    key_a: str | None = None
    key_b: str | None = None
    scales: tuple[float, ...] = ()
    transposed: bool = False
    experts: int = 1
    magnitude: str | None = None
    bias: str | None = None
    value: str | None = None

    @property
    def adds(self) -> bool:
        """Whether something is added to the parameter, or to the value that replaces it."""
        return self.key_a is not None or self.bias is not None

    def load_factors(self, reader: AdapterReader, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Read A `(r, in)` and B `(out, r)` of one expert, float32."""
        assert self.key_a is not None and self.key_b is not None
        a, b = reader.read(self.key_a).flatten(1), reader.read(self.key_b).flatten(1)
        if self.experts > 1:  # as in peft.tuners.lora.ParamWrapper
            a = a.view(self.experts, -1, a.shape[1])[expert or 0]
            b = b.view(b.shape[0], -1, self.experts)[:, :, expert or 0].contiguous()
        return a, b


@dataclass(frozen=True, slots=True)
class SharedValue:
    """A parameter of the base model in an adapter, by its key: all weights that are tied to it become the same.

    `frozen`: LoRA's layer or a module to save lies over it, so that training did not change it; PEFT saves it along.
    """

    key: str
    frozen: bool


def find_edits(
    peft_model: PeftModel, reader: AdapterReader, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Edit], dict[str, SharedValue]]:
    """Find what one adapter does, by parameter of the model: to that parameter alone, and to all tied to it.

    Args:
        peft_model: the model with the adapter in it.
        reader: the adapter, for its keys.
        shapes: of the parameters of the model without the adapter.

    Raises:
        ValueError: if a key of the adapter has no parameter.
        NeedsPeft: if only PEFT's own merge can do it.
    """
    edits: dict[str, Edit] = {}
    taken, own = set(), []
    for path, module in peft_model.base_model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            own.append(f"{PREFIX}{path}.")
        if not isinstance(module, LoraLayer):
            continue
        name = path.replace(".base_layer", "")
        parameter, edit = _describe_layer(path, name, module)
        taken |= {edit.key_a, edit.key_b}
        magnitude, bias = f"{PREFIX}{path}.lora_magnitude_vector", f"{PREFIX}{path}.lora_B.bias"
        if magnitude in reader.keys or f"{magnitude}.weight" in reader.keys:
            if isinstance(module, lora_layers.Embedding | lora_layers._ConvNd):
                raise NeedsPeft(f"`{name}` is a {type(module).__name__} layer with DoRA")
            edit.magnitude = magnitude if magnitude in reader.keys else f"{magnitude}.weight"
            taken |= {magnitude, f"{magnitude}.weight"}
        if bias in reader.keys:
            if f"{name}.bias" not in shapes:
                raise ValueError(f"The adapter has `{bias}`, but `{name}` has no bias to add it to.")
            edits[f"{name}.bias"] = Edit(bias=bias, scales=edit.scales)
            taken.add(bias)
        edits[parameter] = edit
    rest = sorted(set(reader.keys) - taken)
    if not rest:
        return edits, {}
    return edits, _find_values_(edits, rest, (list_shapes(peft_model), tuple(own)), shapes)


def _find_values_(
    edits: dict[str, Edit],
    keys: list[str],
    trained: tuple[Mapping[str, tuple[int, ...]], tuple[str, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, SharedValue]:
    """Add the values that replace one parameter alone. Returns those that replace all tied ones.

    Args:
        edits: by parameter.
        keys: the adapter's other keys.
        trained: the keys that the adapter trains, and the prefixes of modules saved whole.
        shapes: of the model's parameters.
    """
    shared: dict[str, SharedValue] = {}
    for key in keys:
        name = parameter_name(key)
        if name not in shapes:
            if is_duplicate(key, keys):
                continue
            raise ValueError(f"The adapter's `{key}` has no parameter; the nearest are {list_nearest(name, shapes)}.")
        if edits.get(name, Edit()).experts > 1:
            raise NeedsPeft(f"it has both an update and a value for the experts `{name}`")
        if key in trained[0] and key.startswith(trained[1]):
            edits.setdefault(name, Edit()).value = key
        else:
            shared[name] = SharedValue(key, key not in trained[0] and key != PREFIX + name)
    return shared


def _describe_layer(path: str, name: str, module: LoraLayer) -> tuple[str, Edit]:
    """The parameter that a LoRA layer updates, and how."""
    embedding = isinstance(module, lora_layers.Embedding)
    kind = "lora_embedding_{}" if embedding else "lora_{}.weight"
    key_a, key_b = (f"{PREFIX}{path}.{kind.format(factor)}" for factor in "AB")
    edit = Edit(key_a, key_b, (module.scaling["default"],))
    if isinstance(module, lora_layers.ParamWrapper):
        edit.experts = module.num_experts
        edit.transposed = module.num_experts > 1 and not module._did_swap_in_out_features
        return f"{name}.{module.parameter_name}", edit
    if not embedding and not isinstance(module, lora_layers.Linear | lora_layers._ConvNd):
        raise NeedsPeft(f"`{name}` is a {type(module).__name__} layer")
    if getattr(module.get_base_layer(), "groups", 1) > 1:
        raise NeedsPeft(f"`{name}` is a convolution in groups")
    edit.transposed = embedding or bool(getattr(module, "fan_in_fan_out", False))
    return f"{name}.weight", edit
