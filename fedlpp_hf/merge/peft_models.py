# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The model that an adapter was trained on, without memory for its weights: found, built, and compared with the adapter.

PEFT itself applies the adapter's configuration to the model, so that keys and shapes are those that it expects.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.utils import logging

from ..base.modules import build_meta_model
from ..tensors.adapters import PREFIX, adapter_parameters
from .adapter_reader import AdapterReader


logger = logging.get_logger(__name__)

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Initializations that leave the model's own weights alone; the others subtract their start from them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Options with which ΔW is not s·B·A of the stored factors.
_PEFT_ONLY = (
    "use_qalora", "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "use_bdlora", "monteclora_config",
)  # fmt: skip


class NeedsPeft(Exception):
    """The adapter does something that only PEFT's own merge can do; the message says what."""


def check_config(config: PeftConfig) -> None:
    """Refuse an adapter that is more than s·B·A.

    Raises:
        NeedsPeft: saying what it is.
    """
    if not isinstance(config, LoraConfig):
        raise NeedsPeft(f"it is a {config.peft_type} adapter, not LoRA")
    if config.init_lora_weights not in _PLAIN_INITS:
        raise NeedsPeft(f"init_lora_weights={config.init_lora_weights!r} moved the model's own weights")
    used = [name for name in _PEFT_ONLY if getattr(config, name, None)]
    if used:
        raise NeedsPeft(f"it uses `{used[0]}`")


def list_model_classes(config: Any, peft_config: PeftConfig, model_class: Any) -> list[Any]:
    """List the classes that the adapter may have been trained on, the likeliest first.

    None stands for the class that the model's configuration names.
    """
    if model_class is not None:
        return [model_class]
    task = str(getattr(peft_config.task_type, "value", peft_config.task_type))
    trained = (getattr(peft_config, "auto_mapping", None) or {}).get("base_model_class", "")
    names = [*(config.architectures or [])[:1], trained, _AUTO_CLASSES.get(task, "")]
    return [found for name in names if (found := getattr(transformers, name, None)) is not None] or [None]


def build_models(
    config: Any, adapters: Sequence[AdapterReader], model_class: Any
) -> tuple[PreTrainedModel, list[PeftModel]]:
    """Build the model of the first class that fits the adapters: bare, and with each adapter in it.

    Raises:
        ValueError: if no class has the adapters' keys and shapes; the likeliest class's error.
        NeedsPeft: if an adapter can't be applied without the weights.
    """
    problems: list[ValueError] = []
    for candidate in list_model_classes(config, adapters[0].config, model_class):
        try:
            return _build_class(config, adapters, candidate)
        except ValueError as error:
            problems.append(error)
    raise problems[0]


def _build_class(
    config: Any, adapters: Sequence[AdapterReader], model_class: Any
) -> tuple[PreTrainedModel, list[PeftModel]]:
    model = build_meta_model(config, model_class)
    peft_model = _apply_adapter(config, model_class, adapters[0].config)
    labels = _count_labels(config, _list_shapes(peft_model), adapters[0])
    if labels:
        config = type(config).from_dict(config.to_dict() | {"num_labels": labels, "id2label": None, "label2id": None})
        logger.warning(
            f"The adapter's head has {labels} labels, the full model's config another number; it becomes {labels}."
        )
        model, peft_model = (
            build_meta_model(config, model_class),
            _apply_adapter(config, model_class, adapters[0].config),
        )
    peft_models = [peft_model] + [_apply_adapter(config, model_class, reader.config) for reader in adapters[1:]]
    for reader, applied in zip(adapters, peft_models, strict=True):
        _check_keys(reader, applied, model)
    return model, peft_models


def _apply_adapter(config: Any, model_class: Any, peft_config: PeftConfig) -> PeftModel:
    try:
        return get_peft_model(build_meta_model(config, model_class), peft_config, low_cpu_mem_usage=True)
    except NotImplementedError as error:
        raise NeedsPeft(f"it can't be applied without loading the model ({error})") from error


def _list_shapes(peft_model: PeftModel) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in adapter_parameters(peft_model).items()}


def _count_labels(config: Any, expected: Mapping[str, tuple[int, ...]], reader: AdapterReader) -> int | None:
    """The number of classes of the adapter's head, where it differs from the configuration's."""
    keys = [
        key for key in reader.keys if key in expected and ".lora_" not in key and reader.shape(key) != expected[key]
    ]
    rows = {reader.shape(key)[0] for key in keys}
    fits = all(reader.shape(key)[1:] == expected[key][1:] and expected[key][0] == config.num_labels for key in keys)
    return rows.pop() if len(rows) == 1 and fits else None


def _check_keys(reader: AdapterReader, peft_model: PeftModel, model: PreTrainedModel) -> None:
    expected, state = _list_shapes(peft_model), model.state_dict()
    for key in reader.keys:
        if key not in expected and parameter_name(key) not in state:
            raise ValueError(
                f"The adapter's `{key}` has no place in {type(model).__name__}; the nearest are "
                f"{list_nearest(key, expected)}. Was it trained on another architecture?"
            )
        if key in expected and reader.shape(key) != expected[key]:
            raise ValueError(
                f"The adapter's `{key}` has shape {reader.shape(key)}; {type(model).__name__} with its "
                f"adapter_config.json has {expected[key]}. Is it of another rank, or for another model?"
            )
    missing = sorted(set(expected) - set(reader.keys))
    if missing:
        raise ValueError(
            f"The adapter has no `{missing[0]}` ({len(missing)} missing), but its adapter_config.json says it does. "
            f"The nearest keys it has are {list_nearest(missing[0], reader.keys)}."
        )


def parameter_name(key: str) -> str:
    """The model's parameter for an adapter's `key` that is not a LoRA factor."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def list_nearest(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, for an error message."""
    return ", ".join(f"`{n}`" for n in difflib.get_close_matches(name, list(names), 3, 0.3)) or "none"
