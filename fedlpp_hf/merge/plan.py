# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which bytes of a checkpoint an adapter changes, and to what: everything about a merge but the reading and writing.

PEFT itself is asked: the adapter's configuration is applied to the model without memory for its weights, and every LoRA
layer that results says what it does to which parameter. transformers' own rules say where that parameter is stored.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora_layers
from transformers import PreTrainedModel
from transformers.utils import logging

from ..base.checkpoint import plan_tensors
from ..base.export import build_meta_model
from ..tensors.adapters import PREFIX, adapter_parameters
from .locations import Edit, Piece, locate_parameters, whole_pieces
from .sources import AdapterReader


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


@dataclass(slots=True)
class MergePlan:
    """What to do to a checkpoint.

    `edits` by parameter of the model; `pieces` by tensor of the checkpoint; `added`: tensors that the checkpoint does not
    have yet, as (name, parameter whose stored tensor it starts from or None, edit); `config_changes` for `config.json`.
    """

    edits: dict[str, Edit]
    pieces: dict[str, list[Piece]]
    added: list[tuple[str, str | None, Edit]] = field(default_factory=list)
    config_changes: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)


def plan_merge(
    config: Any,
    names: Mapping[str, tuple[int, ...]],
    adapters: Sequence[AdapterReader],
    model_class: Any = None,
) -> MergePlan:
    """Find what `adapters` change in a checkpoint with the tensors `names` (shapes by name).

    Raises:
        ValueError: if an adapter does not fit the model, naming the tensor.
        NeedsPeft: if only PEFT's own merge can do it.
    """
    for reader in adapters:
        _check_config(reader.config)
        if reader.keys != adapters[0].keys:
            other = sorted(set(reader.keys) ^ set(adapters[0].keys))
            raise ValueError(
                f"The adapters differ in `{other[0]}`; only adapters of the same targets can be averaged."
            )
    model, peft_models = _build_models(config, adapters, model_class)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = [_find_edits(peft_model, adapters[0], shapes) for peft_model in peft_models]
    edits = found[0]
    for name, edit in edits.items():
        edit.scales = tuple(scale for others in found for scale in others[name].scales)
        if edit.magnitude is not None and len(adapters) > 1:
            raise ValueError(f"`{name}` has a DoRA magnitude; several such adapters have no exact mean. Merge one.")
    tensors = plan_tensors(model, names)
    pieces, rearranged = locate_parameters(model, tensors, names, edits)
    plan = MergePlan(edits, {}, shapes=shapes)
    plan.transposed = {n + ".weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    plan.config_changes = {"architectures": [type(model).__name__]}
    if model.config.num_labels != config.num_labels:
        plan.config_changes |= {"id2label": model.config.id2label, "label2id": model.config.label2id}
    _untie(model, plan, pieces, names)
    for name in edits:
        if name not in pieces:
            edit = edits[name]
            if name in rearranged:
                raise NeedsPeft(f"`{name}` is stored in another layout than the model has it")
            if edit.value is None and name not in {added for added, _, _ in plan.added}:
                raise ValueError(
                    f"The adapter changes `{name}`, which the checkpoint has not under any name; the nearest are "
                    f"{_nearest(name, names)}. Is it the full model that the adapter was trained on?"
                )
            if edit.value is not None:
                plan.added.append((name, None, edit))
    for parts in pieces.values():
        for piece in parts:
            plan.pieces.setdefault(piece.tensor, []).append(piece)
    return plan


def _check_config(config: PeftConfig) -> None:
    if not isinstance(config, LoraConfig):
        raise NeedsPeft(f"it is a {config.peft_type} adapter, not LoRA")
    if config.init_lora_weights not in _PLAIN_INITS:
        raise NeedsPeft(f"init_lora_weights={config.init_lora_weights!r} moved the model's own weights")
    used = [name for name in _PEFT_ONLY if getattr(config, name, None)]
    if used:
        raise NeedsPeft(f"it uses `{used[0]}`")


def model_classes(config: Any, peft_config: PeftConfig, model_class: Any) -> list[Any]:
    """The classes the adapter may have been trained on, the likeliest first; None stands for the configuration's."""
    if model_class is not None:
        return [model_class]
    task = str(getattr(peft_config.task_type, "value", peft_config.task_type))
    trained = (getattr(peft_config, "auto_mapping", None) or {}).get("base_model_class", "")
    names = [*(config.architectures or [])[:1], trained, _AUTO_CLASSES.get(task, "")]
    return [found for name in names if (found := getattr(transformers, name, None)) is not None] or [None]


def _build_models(
    config: Any, adapters: Sequence[AdapterReader], model_class: Any
) -> tuple[PreTrainedModel, list[PeftModel]]:
    """The model's class that gives the adapter's keys and shapes, without memory, bare and with the adapter in it."""
    problems: list[ValueError] = []
    for candidate in model_classes(config, adapters[0].config, model_class):
        try:
            return _build_model(config, adapters, candidate)
        except ValueError as error:
            problems.append(error)
    raise problems[0]


def _build_model(
    config: Any, adapters: Sequence[AdapterReader], model_class: Any
) -> tuple[PreTrainedModel, list[PeftModel]]:
    model = build_meta_model(config, model_class)
    peft_model = _inject(config, model_class, adapters[0].config)
    expected = {key: tuple(tensor.shape) for key, tensor in adapter_parameters(peft_model).items()}
    labels = _other_labels(config, expected, adapters[0])
    if labels:
        config = type(config).from_dict(config.to_dict() | {"num_labels": labels, "id2label": None, "label2id": None})
        logger.warning(
            f"The adapter's head has {labels} labels and the full model's config another number; it becomes {labels}."
        )
        model, peft_model = build_meta_model(config, model_class), _inject(config, model_class, adapters[0].config)
        expected = {key: tuple(tensor.shape) for key, tensor in adapter_parameters(peft_model).items()}
    peft_models, known = [], [(adapters[0].config, peft_model)]
    for reader in adapters:  # clients may have ranks of their own, and most have none
        fitting = next((fits for config_, fits in known if config_ is reader.config), None)
        if fitting is None:
            fitting = _inject(config, model_class, reader.config)
            known.append((reader.config, fitting))
        _check_keys(reader, fitting, model)
        peft_models.append(fitting)
    return model, peft_models


def _check_keys(reader: AdapterReader, peft_model: PeftModel, model: PreTrainedModel) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in adapter_parameters(peft_model).items()}
    state = model.state_dict()
    for key in reader.keys:
        if key not in expected and parameter_name(key) not in state:
            raise ValueError(
                f"The adapter's `{key}` has no home in {type(model).__name__}; the nearest are "
                f"{_nearest(key, expected)}. Was it trained on another architecture?"
            )
        if key in expected and reader.shape(key) != expected[key]:
            raise ValueError(
                f"The adapter's `{key}` has shape {reader.shape(key)}; {type(model).__name__} with its "
                f"adapter_config.json has {expected[key]}. Is it of another rank, or for another model?"
            )
    missing = sorted(set(expected) - set(reader.keys))
    if missing:
        raise ValueError(
            f"The adapter has no `{missing[0]}` ({len(missing)} missing), which its adapter_config.json says it has. "
            f"The nearest it has are {_nearest(missing[0], reader.keys)}."
        )


def _inject(config: Any, model_class: Any, peft_config: PeftConfig) -> PeftModel:
    try:
        return get_peft_model(build_meta_model(config, model_class), peft_config, low_cpu_mem_usage=True)
    except NotImplementedError as error:
        raise NeedsPeft(f"it can't be applied without loading the model ({error})") from error


def _other_labels(config: Any, expected: Mapping[str, tuple[int, ...]], reader: AdapterReader) -> int | None:
    """The number of classes of the adapter's head, where it is not the configuration's."""
    keys = [
        key for key in reader.keys if key in expected and ".lora_" not in key and reader.shape(key) != expected[key]
    ]
    rows = {reader.shape(key)[0] for key in keys}
    fits = all(reader.shape(key)[1:] == expected[key][1:] and expected[key][0] == config.num_labels for key in keys)
    return rows.pop() if len(rows) == 1 and fits else None


def parameter_name(key: str) -> str:
    """The model's parameter that an adapter's `key` outside the LoRA factors stands for."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _nearest(name: str, names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in difflib.get_close_matches(name, list(names), 3, 0.3)) or "none"


def _find_edits(peft_model: PeftModel, reader: AdapterReader, state: Mapping[str, tuple[int, ...]]) -> dict[str, Edit]:
    edits: dict[str, Edit] = {}
    taken = set()
    for path, module in peft_model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = path.replace(".base_layer", "")
        embedding = isinstance(module, lora_layers.Embedding)
        kind = "lora_embedding_{}" if embedding else "lora_{}.weight"
        edit = Edit(
            PREFIX + f"{path}." + kind.format("A"),
            PREFIX + f"{path}." + kind.format("B"),
            (module.scaling["default"],),
        )
        if isinstance(module, lora_layers.ParamWrapper):
            parameter = f"{name}.{module.parameter_name}"
            edit.experts, edit.transposed = (
                module.num_experts,
                module.num_experts > 1 and not module._did_swap_in_out_features,
            )
        elif embedding or isinstance(module, lora_layers.Linear | lora_layers._ConvNd):
            parameter = f"{name}.weight"
            edit.transposed = embedding or bool(getattr(module, "fan_in_fan_out", False))
            if getattr(module.get_base_layer(), "groups", 1) > 1:
                raise NeedsPeft(f"`{name}` is a convolution in groups")
        else:
            raise NeedsPeft(f"`{name}` is a {type(module).__name__} layer")
        taken |= {edit.key_a, edit.key_b}
        magnitude, bias = f"{PREFIX}{path}.lora_magnitude_vector", f"{PREFIX}{path}.lora_B.bias"
        if magnitude in reader.keys or f"{magnitude}.weight" in reader.keys:
            if embedding or isinstance(module, lora_layers._ConvNd):
                raise NeedsPeft(f"`{name}` is a {type(module).__name__} layer with DoRA")
            edit.magnitude = magnitude if magnitude in reader.keys else f"{magnitude}.weight"
            taken.add(edit.magnitude)
        if bias in reader.keys:
            if f"{name}.bias" not in state:
                raise ValueError(f"The adapter has `{bias}`, but `{name}` has no bias to add it to.")
            edits[f"{name}.bias"] = Edit(bias=bias, scales=edit.scales)
            taken.add(bias)
        edits[parameter] = edit
    for key in sorted(set(reader.keys) - taken):
        name = parameter_name(key)
        if name not in state:
            raise ValueError(f"The adapter's `{key}` has no home; the nearest are {_nearest(name, state)}.")
        if name in edits:
            # A bias trained as a whole, under LoRA's own (`lora_bias`), or a weight saved along with its update.
            raise NeedsPeft(f"it has both an update and a value for `{name}`")
        edits[name] = Edit(value=key)
    return edits


def _untie(model: PreTrainedModel, plan: MergePlan, pieces: dict[str, list[Piece]], names: Iterable[str]) -> None:
    """Give weights that share one tensor one each, where the adapter changes them differently.

    PEFT's merge would change the shared tensor, and with it the layer that the adapter does not touch.
    """
    for copy, original in model.all_tied_weights_keys.items():
        if plan.edits.get(copy) == plan.edits.get(original):  # both None, as a rule
            continue
        if len(model.all_tied_weights_keys) > 1:
            raise ValueError(
                f"The adapter changes `{copy if copy in plan.edits else original}`, which {type(model).__name__} shares "
                f"with {', '.join(sorted(set(model.all_tied_weights_keys) | {original}))}; they can't be told apart. "
                "Train an adapter without that target."
            )
        stored, absent = (original, copy) if original in pieces else (copy, original)
        edit = plan.edits.get(absent, Edit())
        if absent in plan.shapes and absent in names:  # tied, and yet stored twice
            pieces[absent] = whole_pieces(absent, absent, plan.shapes[absent], None)
        if absent not in pieces:
            plan.added.append((absent, None if edit.value else stored, edit))
            plan.edits.pop(absent, None)
        plan.config_changes["tie_word_embeddings"] = False
        logger.warning(f"The adapter changes only one of `{copy}` and `{original}`, which were tied; they are untied.")
