# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Planning a merge: which bytes of a checkpoint an adapter changes, and to what, before any of them is read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..base.reader import BaseReader
from ..base.tensor_plan import plan_tensors
from .adapter_reader import AdapterReader
from .edits import Edit, find_edits
from .locations import Piece, locate_parameters, whole_pieces
from .peft_models import NeedsPeft, build_models, check_config, list_nearest


logger = logging.get_logger(__name__)


@dataclass(slots=True)
class MergePlan:
    """What to do to a checkpoint.

    `edits`: by parameter of the model; `pieces`: by tensor of the checkpoint; `added`: tensors that are new to the
    checkpoint, as (name, parameter whose stored tensor it starts from or None, edit); `config_changes`: for `config.json`;
    `shapes`: of the model's parameters; `transposed`: the parameters of `Conv1D` modules.
    """

    edits: dict[str, Edit]
    pieces: dict[str, list[Piece]]
    added: list[tuple[str, str | None, Edit]] = field(default_factory=list)
    config_changes: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)

    def tensor_of(self, parameter: str) -> str:
        """The checkpoint's tensor that begins with a parameter."""
        return next(name for name, pieces in self.pieces.items() if pieces[0].parameter == parameter)


@dataclass(frozen=True, slots=True)
class MergeInputs:
    """All that new rows are computed from, besides the full model.

    `weights` add up to one. With a `base` the norm of E = W − Q(W) is computed, too; with `into_base` the update is added
    to Q(W) and not to W.
    """

    plan: MergePlan
    adapters: Sequence[AdapterReader]
    weights: Sequence[float]
    base: BaseReader | None = None
    into_base: bool = False

    def base_name(self, parameter: str) -> str:
        """The base's name for a parameter; for one that was tied until this merge, the name it was stored under."""
        return next((stored for name, stored, _ in self.plan.added if name == parameter and stored), parameter)

    def reads_base(self, parameter: str) -> bool:
        """Whether Q(W) of a parameter is needed: to merge into it, or for the norm of E."""
        return self.base is not None and self.base.is_quantized(self.base_name(parameter))

    def takes_base(self, parameter: str) -> bool:
        """Whether a parameter becomes Q(W) + ΔW."""
        return self.into_base and self.reads_base(parameter)

    def edit_of(self, parameter: str) -> Edit | None:
        """What happens to a parameter; None where its bytes stay."""
        return self.plan.edits.get(parameter, Edit() if self.takes_base(parameter) else None)


def plan_merge(
    config: Any, stored: Mapping[str, tuple[int, ...]], adapters: Sequence[AdapterReader], model_class: Any = None
) -> MergePlan:
    """Find what adapters change in a checkpoint.

    Args:
        config: the full model's configuration.
        stored: the shapes of the checkpoint's tensors.
        adapters: one, or several with the same targets.
        model_class: the class they were trained on, where configurations don't tell.

    Raises:
        ValueError: if an adapter does not fit the model, naming the tensor.
        NeedsPeft: if only PEFT's own merge can do it.
    """
    for reader in adapters:
        check_config(reader.config)
        if reader.keys != adapters[0].keys:
            other = sorted(set(reader.keys) ^ set(adapters[0].keys))
            raise ValueError(
                f"The adapters differ in `{other[0]}`; only adapters with the same targets can be averaged."
            )
    model, peft_models = build_models(config, adapters, model_class)
    plan = MergePlan({}, {}, config_changes={"architectures": [type(model).__name__]})
    plan.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    plan.transposed = {n + ".weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    if model.config.num_labels != config.num_labels:
        plan.config_changes |= {"id2label": model.config.id2label, "label2id": model.config.label2id}
    found = [find_edits(peft_model, adapters[0], plan.shapes) for peft_model in peft_models]
    plan.edits = found[0]
    for name, edit in plan.edits.items():
        edit.scales = tuple(scale for others in found for scale in others[name].scales)
        if edit.magnitude is not None and len(adapters) > 1:
            raise ValueError(f"`{name}` has a DoRA magnitude; several such adapters have no exact mean. Merge one.")
    pieces, rearranged = locate_parameters(model, plan_tensors(model, stored), stored, plan.edits)
    _untie_(plan, model, pieces, stored)
    _place_edits_(plan, set(pieces), rearranged, stored)
    for parts in pieces.values():
        for piece in parts:
            plan.pieces.setdefault(piece.tensor, []).append(piece)
    return plan


def _place_edits_(plan: MergePlan, located: set[str], rearranged: set[str], stored: Iterable[str]) -> None:
    """Add the values that are new to the checkpoint, and refuse edits of parameters that it does not have."""
    added = {name for name, _, _ in plan.added}
    for name, edit in plan.edits.items():
        if name in located:
            continue
        if name in rearranged:
            raise NeedsPeft(f"`{name}` is stored in another layout than the model has it")
        if edit.value is not None:
            plan.added.append((name, None, edit))
        elif name not in added:
            raise ValueError(
                f"The adapter changes `{name}`, which is not in the checkpoint; the nearest tensors are "
                f"{list_nearest(name, stored)}. Is it the full model that the adapter was trained on?"
            )


def _untie_(
    plan: MergePlan, model: PreTrainedModel, pieces: dict[str, list[Piece]], stored: Mapping[str, tuple[int, ...]]
) -> None:
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
        present, absent = (original, copy) if original in pieces else (copy, original)
        edit = plan.edits.get(absent, Edit())
        if absent in plan.shapes and absent in stored:  # tied, and yet stored twice
            pieces[absent] = whole_pieces(absent, absent, plan.shapes[absent], None)
        if absent not in pieces:
            plan.added.append((absent, None if edit.value else present, edit))
            plan.edits.pop(absent, None)
        plan.config_changes["tie_word_embeddings"] = False
        logger.warning(f"The adapter changes only one of `{copy}` and `{original}`, which were tied; they are untied.")
