# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Numbers of labels and of tokens that an adapter was trained with, where the full model has others."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..tensors.lora import PREFIX
from .adapter_reader import AdapterReader
from .tying import list_tied_groups


_SEGMENTS = ("base_layer", "original_module", "token_adapter")  # that PEFT puts into a parameter's name


@dataclass(frozen=True, slots=True)
class Sizes:
    """The adapter's number of labels, and of tokens in the vocabulary; None where it is the full model's."""

    labels: int | None = None
    tokens: int | None = None


def parameter_name(key: str) -> str:
    """The model's parameter for an adapter's `key` that is not a LoRA factor."""
    return ".".join(part for part in key.removeprefix(PREFIX).split(".") if part not in _SEGMENTS)


def find_sizes(model: PreTrainedModel, reader: AdapterReader) -> Sizes:
    """Find the sizes in which an adapter's tensors differ from the full model's parameters.

    Raises:
        ValueError: if the adapter has several sizes of the vocabulary.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    vocabulary, embedding = _list_vocabulary(model), _find_embedding(model)
    tokens, others, rows = set(), [], set()
    for key in reader.keys:
        name, found = _find_parameter(key, reader)
        if name not in shapes or found is None or not shapes[name]:
            continue
        if name in vocabulary and embedding is not None:
            if found[0] != shapes[name][0] == embedding.num_embeddings and found[1:] in ((), shapes[name][1:]):
                tokens.add(found[0])
        elif ".lora_" not in key and found != shapes[name] and found:
            others.append(found[1:] == shapes[name][1:] and shapes[name][0] == model.config.num_labels)
            rows.add(found[0])
    if len(tokens) > 1:
        raise ValueError(
            f"The adapter has embeddings or heads of {sorted(tokens)} tokens; expected one size of the vocabulary. Was it put "
            "together from several?"
        )
    return Sizes(rows.pop() if len(rows) == 1 and all(others) else None, tokens.pop() if tokens else None)


def _find_parameter(key: str, reader: AdapterReader) -> tuple[str, tuple[int, ...] | None]:
    """The parameter that a key is about, and its shape according to the key's tensor, or only its rows."""
    shape = reader.shape(key)
    for ending, axis in ((".lora_embedding_A", 1), (".lora_B.weight", 0)):
        if key.endswith(ending) and len(shape) == 2:
            return parameter_name(key.removesuffix(ending)) + ".weight", (shape[axis],)
    return parameter_name(key), None if ".lora_" in key else shape


def _find_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:  # of models without tokens
        return None
    return found if isinstance(found, nn.Embedding) else None


def _list_vocabulary(model: PreTrainedModel) -> set[str]:
    """The parameters with a row for each token: of the embeddings and the head, and what is tied to them."""
    embedding = _find_embedding(model)
    if embedding is None:
        return set()
    modules = (embedding, model.get_output_embeddings())
    names = {
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        if any(module is wanted for wanted in modules)
        for leaf in ("weight", "bias")
    }
    return names.union(*(group for group in list_tied_groups(model) if names.intersection(group)))


def change_sizes(config: Any, sizes: Sizes) -> tuple[Any, dict[str, Any]]:
    """Give a configuration an adapter's sizes. Returns a copy, and what is new in it as JSON values."""
    changes: dict[str, Any] = {}
    if sizes.labels is not None:
        config = type(config).from_dict(
            config.to_dict() | {"num_labels": sizes.labels, "id2label": None, "label2id": None}
        )
        changes |= {"id2label": config.id2label, "label2id": config.label2id}
    if sizes.tokens is not None:
        config = deepcopy(config)
        text = config.get_text_config()
        text.vocab_size = sizes.tokens
        changes |= _nest(config, text, {"vocab_size": sizes.tokens}) or {}
    return config, changes


def _nest(config: Any, wanted: Any, values: dict[str, Any]) -> dict[str, Any] | None:
    """Values of a configuration within `config`, as JSON values of `config`; None if it is not in there."""
    if config is wanted:
        return values
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None and (found := _nest(inner, wanted, values)) is not None:
            return {name: found}
    return None


@dataclass(frozen=True, slots=True)
class AdaptedSizes:
    """A model with an adapter's vocabulary, for [`check_vocabulary`].

    `before`: the shapes of the parameters with the full model's vocabulary; `tokens`: the size of that one, and of the
    adapter's; `whole`: the parameters of modules that the adapter saves whole.
    """

    model: PreTrainedModel
    before: Mapping[str, tuple[int, ...]]
    tokens: tuple[int, int]
    whole: frozenset[str]


def check_vocabulary(adapted: AdaptedSizes, reader: AdapterReader) -> None:
    """Refuse an adapter that was trained with another vocabulary, but does not have everything it changes.

    Args:
        adapted: the model with the adapter's vocabulary.
        reader: the adapter.

    Raises:
        ValueError: naming the vocabulary, and what the adapter does not have.
    """
    given = {key: parameter_name(key) for key in reader.keys if ".lora_" not in key}
    # What is tied to a weight of the base model gets its value; a module that is saved whole is itself alone.
    shared = {name for key, name in given.items() if name not in adapted.whole or key != PREFIX + name}
    groups = list_tied_groups(adapted.model)
    for name, tensor in adapted.model.state_dict().items():
        if tuple(tensor.shape) == adapted.before.get(name, tuple(tensor.shape)) or name in given.values():
            continue
        if shared.isdisjoint(next((group for group in groups if name in group), [name])):
            raise ValueError(
                f"{explain_vocabulary(*adapted.tokens)}, and does not have the new `{name}`. {RESIZE.format(adapted.tokens[1])}"
            )


def check_tokens(model: PreTrainedModel, peft_config: Any, tokens: int | None) -> None:
    """Refuse trained tokens that are beyond the vocabulary.

    Args:
        model: the full model.
        peft_config: the adapter's configuration.
        tokens: the size of the adapter's vocabulary, where it tells one.

    Raises:
        ValueError: naming the vocabulary.
    """
    trained = (
        getattr(peft_config, "trainable_token_indices", None) or getattr(peft_config, "token_indices", None) or []
    )
    lists = trained.values() if isinstance(trained, dict) else [trained]
    indices = [index for part in lists for index in (part if isinstance(part, list | tuple) else [part])]
    if not all(type(index) is int for index in indices):
        raise ValueError(f"adapter_config.json trains the tokens {trained!r:.80}; expected whole numbers.")
    highest = max(indices, default=-1)
    embedding = _find_embedding(model)
    if embedding is not None and highest >= (tokens or embedding.num_embeddings):
        raise ValueError(
            f"{explain_vocabulary(embedding.num_embeddings, highest + 1, 'at least ')}, and does not have the new embeddings. "
            f"{RESIZE.format('…')}"
        )


def explain_vocabulary(before: int, tokens: int, least: str = "") -> str:
    """The beginning of an error about the vocabulary."""
    return f"The adapter was trained with a vocabulary of {least}{tokens} tokens, where the full model has {before}"


RESIZE = (
    "Merge into the full model as it was resized for the training (`resize_token_embeddings({})`, then `save_pretrained`); or "
    "save the adapter with `save_pretrained(..., save_embedding_layers=True)`."
)
