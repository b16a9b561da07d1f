# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The model that an adapter was trained on, without memory for its weights: found, built, and compared with the adapter.

PEFT itself applies the adapter's configuration to the model, so that keys and shapes are as it expects.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from transformers import PreTrainedModel
from transformers.utils import logging

from ..base.modules import build_meta_model
from ..tensors.adapters import adapter_parameters
from ..tensors.lora import PREFIX
from .adapter_reader import AdapterReader
from .foreign_config import check_foreign_config
from .sizes import (
    RESIZE,
    AdaptedSizes,
    change_sizes,
    check_tokens,
    check_vocabulary,
    explain_vocabulary,
    find_sizes,
    parameter_name,
)
from .task_classes import find_auto_class


logger = logging.get_logger(__name__)

# Initializations that leave the model's own weights alone; the others subtract their start from them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Options with which ΔW is not s·B·A of the stored factors.
_PEFT_ONLY = (
    "use_qalora", "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "use_bdlora", "monteclora_config",
)  # fmt: skip

_OTHER = (
    "Was it trained on another architecture? Or saved with an older transformers, whose keys PEFT does not convert for this "
    "model? Then rename its keys."
)


class NeedsPeft(Exception):
    """The adapter does something that only PEFT's own merge can do; the message says what."""


@dataclass(frozen=True, slots=True)
class AdaptedModel:
    """The model that adapters were trained on, without memory for its weights.

    `config`: the full model's, with the adapter's numbers of labels and tokens, and `config_changes`: what is new in it;
    `model`: of that configuration; `peft_models`: the same with each adapter in it; `before`: the shapes of the parameters
    with the full model's own numbers; `tokens`: the full model's and the adapter's, where they differ; `needs_peft`: why only
    PEFT's own merge can do it.
    """

    config: Any
    model: PreTrainedModel
    before: Mapping[str, tuple[int, ...]]
    peft_models: list[PeftModel] = field(default_factory=list)
    config_changes: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None
    needs_peft: str | None = None


def _explain_peft(config: PeftConfig) -> str | None:
    """Why an adapter is more than s·B·A; None if it is not."""
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)  # a damaged configuration may have none
        return f"it is a {kind} adapter, not LoRA"
    if config.init_lora_weights not in _PLAIN_INITS:
        return f"init_lora_weights={config.init_lora_weights!r} moved the model's own weights"
    used = [name for name in _PEFT_ONLY if getattr(config, name, None)]
    return f"it uses `{used[0]}`" if used else None


def _list_model_classes(config: Any, peft_config: PeftConfig, model_class: Any) -> list[Any]:
    """List the classes that the adapter may have been trained on, the likeliest first.

    None stands for the class that the model's configuration names.
    """
    if model_class is not None:
        return [model_class]
    mapping = getattr(peft_config, "auto_mapping", None)
    trained = mapping.get("base_model_class", "") if isinstance(mapping, dict) else ""
    names = [*(config.architectures or [])[:1], str(trained), find_auto_class(peft_config) or ""]
    classes = [found for name in names if (found := getattr(transformers, name, None)) is not None]
    # Not the class of another architecture, which can't be built of this configuration.
    fitting = [found for found in classes if isinstance(config, getattr(found, "config_class", None) or object)]
    return fitting or [None]


def build_models(config: Any, adapters: Sequence[AdapterReader], model_class: Any) -> AdaptedModel:
    """Build the model of the first class that fits the adapters: bare, and with each adapter in it.

    Args:
        config: the full model's configuration.
        adapters: one, or several with the same targets. Keys of older versions are converted.
        model_class: the class they were trained on, where configurations don't tell.

    Raises:
        ValueError: if no class has the adapters' keys and shapes; the likeliest class's error.
    """
    problems: list[ValueError] = []
    for candidate in _list_model_classes(config, adapters[0].config, model_class):
        try:
            return _build_class(config, adapters, candidate)
        except ValueError as error:
            problems.append(error)
    raise problems[0]


def _build_class(config: Any, adapters: Sequence[AdapterReader], model_class: Any) -> AdaptedModel:
    model = build_meta_model(config, model_class)
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    for reader in adapters:
        check_foreign_config(reader.config, modules)
        reader.use_keys_of(model)
        if reader.keys != adapters[0].keys:
            other = sorted(set(reader.keys) ^ set(adapters[0].keys))
            raise ValueError(
                f"The adapters differ in `{other[0]}`; only adapters with the same targets can be averaged."
            )
    sizes = find_sizes(model, adapters[0])
    check_tokens(model, adapters[0].config, sizes.tokens)
    resized, changes = change_sizes(config, sizes)
    tokens = None
    if changes:
        model, own = _build_resized(resized, model_class, sizes.tokens, model), model
        tokens = None if sizes.tokens is None else (own.get_input_embeddings().num_embeddings, sizes.tokens)
    reason = next((found for reader in adapters if (found := _explain_peft(reader.config))), None)
    peft_models = []
    for reader in adapters:
        if isinstance(reader.config, LoraConfig):
            try:
                peft_models.append(_apply_adapter(resized, model_class, reader.config))
                _check_keys(reader, peft_models[-1], model)
            except NotImplementedError as error:
                reason = reason or f"it can't be applied without loading the model ({error})"
            except Exception as error:  # each field of a configuration is judged somewhere else in PEFT
                if type(error) is ValueError:
                    raise
                raise ValueError(
                    f"PEFT can't build the adapter of `{reader.directory}` ({type(error).__name__}: {error}). Is its "
                    "adapter_config.json damaged?"
                ) from error
        else:
            _check_modules(reader, model)
    if tokens is not None:
        whole = {
            f"{path}.{leaf}"
            for path, module in (peft_models[0].base_model.model.named_modules() if peft_models else ())
            if isinstance(module, ModulesToSaveWrapper)
            for leaf in module.original_module.state_dict()
        }
        check_vocabulary(AdaptedSizes(model, before, tokens, frozenset(whole)), adapters[0])
        logger.warning(
            f"The adapter was trained with a vocabulary of {tokens[1]} tokens; the merged model's becomes that."
        )
    if sizes.labels is not None:
        logger.warning(
            f"The adapter's head has {sizes.labels} labels, the full model's config another number; it becomes {sizes.labels}."
        )
    return AdaptedModel(resized, model, before, peft_models, changes, tokens, reason)


def _build_resized(config: Any, model_class: Any, tokens: int | None, model: PreTrainedModel) -> PreTrainedModel:
    if tokens is None:
        return build_meta_model(config, model_class)
    before = model.get_input_embeddings().num_embeddings
    try:
        resized = build_meta_model(config, model_class)
        if resized.get_input_embeddings().num_embeddings == tokens:
            return resized
        problem = f"the vocabulary of {type(model).__name__} is not in its configuration's `vocab_size`"
    except AssertionError as error:  # such as a padding token beyond the last one
        problem = str(error)
    raise ValueError(
        f"{explain_vocabulary(before, tokens)}, and that can't be changed ({problem}). {RESIZE.format(tokens)}"
    )


def _apply_adapter(config: Any, model_class: Any, peft_config: PeftConfig) -> PeftModel:
    peft_config = deepcopy(peft_config)  # which PEFT changes, as it does the model's
    if peft_config.init_lora_weights not in _PLAIN_INITS:
        peft_config.init_lora_weights = True  # the same layers, without a computation on weights that are not there
    return get_peft_model(build_meta_model(deepcopy(config), model_class), peft_config, low_cpu_mem_usage=True)


def list_shapes(peft_model: PeftModel) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors by their keys in a PEFT repository."""
    return {key: tuple(tensor.shape) for key, tensor in adapter_parameters(peft_model).items()}


def is_duplicate(key: str, keys: Iterable[str]) -> bool:
    """Whether a key only repeats another, as PEFT does where it saves embeddings along."""
    if key.endswith(".lora_magnitude_vector.weight"):
        return key.removesuffix(".weight") in keys
    return (".modules_to_save." in key and key.replace(".modules_to_save.", ".") in keys) or ".token_adapter." in key


def _check_keys(reader: AdapterReader, peft_model: PeftModel, model: PreTrainedModel) -> None:
    expected, state = list_shapes(peft_model), model.state_dict()
    for key in reader.keys:
        if key in expected:
            shape, what = expected[key], "with its adapter_config.json "
        elif (name := parameter_name(key)) in state:
            shape, what = tuple(state[name].shape), ""
        elif is_duplicate(key, reader.keys):
            continue
        else:
            raise ValueError(
                f"The adapter's `{key}` has no place in {type(model).__name__}; the nearest are "
                f"{list_nearest(key, expected)}. {_OTHER}"
            )
        if reader.shape(key) != shape:
            raise ValueError(
                f"The adapter's `{key}` has shape {reader.shape(key)}; {type(model).__name__} {what}has {shape}. Is it of "
                "another rank, or for another model?"
            )
    missing = sorted(set(expected) - set(reader.keys))
    if missing:
        raise ValueError(
            f"The adapter has no `{missing[0]}` ({len(missing)} missing), but its adapter_config.json says it does. "
            f"The nearest keys it has are {list_nearest(missing[0], reader.keys)}."
        )


def _check_modules(reader: AdapterReader, model: PreTrainedModel) -> None:
    """Refuse an adapter other than LoRA for modules that the model does not have."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(reader.config.peft_type, "")
    modules, state = dict(model.named_modules()), model.state_dict()
    for key in reader.keys:
        path = parameter_name(key)
        found = path in state or (prefix and f".{prefix}" in key and path.split(f".{prefix}")[0] in modules)
        if not found and key.startswith(PREFIX) and not is_duplicate(key, reader.keys):
            raise ValueError(
                f"The adapter's `{key}` has no place in {type(model).__name__}; the nearest are {list_nearest(path, modules)}. "
                + _OTHER
            )


def list_nearest(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, for an error message."""
    return ", ".join(f"`{n}`" for n in difflib.get_close_matches(name, list(names), 3, 0.3)) or "none"
