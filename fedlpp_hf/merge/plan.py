# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Planning a merge: which bytes of a checkpoint an adapter changes, and to what, before any of them is read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from ..base.full_model import FullModel
from ..base.reader import BaseReader
from ..base.tensor_plan import TensorPlan
from .adapter_reader import AdapterReader
from .edits import Edit, find_edits
from .locations import Piece, locate_parameters, whole_pieces
from .peft_models import AdaptedModel, NeedsPeft, list_nearest
from .shared_values import drop_copies, find_odd_one, replace_shared_
from .tying import check_untied, list_tied_groups, untie_config


logger = logging.get_logger(__name__)


@dataclass(slots=True)
class MergePlan:
    """What to do to a checkpoint.

    `edits`: by parameter of the model; `pieces`: by tensor of the checkpoint; `added`: tensors that are new to the
    checkpoint, as (name, parameter whose stored tensor it starts from or None, edit); `config_changes`: for `config.json`;
    `shapes`: of the model's parameters.
    """

    edits: dict[str, Edit]
    pieces: dict[str, list[Piece]]
    added: list[tuple[str, str | None, Edit]] = field(default_factory=list)
    config_changes: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def tensor_of(self, parameter: str) -> str:
        """The checkpoint's tensor that begins with a parameter."""
        return next(name for name, pieces in self.pieces.items() if pieces[0].parameter == parameter)


@dataclass(frozen=True, slots=True)
class MergeInputs:
    """All that new rows are computed from, besides the full model.

    `weights` add up to one. With a `base` the norm of E = W − Q(W) is computed, too, and the update is added to
    W − `base_weight`·E.
    """

    plan: MergePlan
    adapters: Sequence[AdapterReader]
    weights: Sequence[float]
    base: BaseReader | None = None
    base_weight: float = 0.0

    def base_name(self, parameter: str) -> str:
        """The base's name for a parameter; for one that was tied until this merge, the name it was stored under."""
        return next((stored for name, stored, _ in self.plan.added if name == parameter and stored), parameter)

    def reads_base(self, parameter: str) -> bool:
        """Whether Q(W) of a parameter is needed: to move towards it, or for the norm of E."""
        if self.base is None or not self.base.is_quantized(self.base_name(parameter)):
            return False
        edit = self.plan.edits.get(parameter)
        return edit is None or edit.value is None

    def takes_base(self, parameter: str) -> bool:
        """Whether a parameter becomes W − λE + ΔW with λ above zero."""
        return self.base_weight > 0 and self.reads_base(parameter)

    def edit_of(self, parameter: str) -> Edit | None:
        """What happens to a parameter; None where its bytes stay."""
        return self.plan.edits.get(parameter, Edit() if self.takes_base(parameter) else None)


def plan_merge(
    adapted: AdaptedModel,
    tensors: TensorPlan,
    source: FullModel,
    adapters: Sequence[AdapterReader],
    base: BaseReader | None = None,
) -> MergePlan:
    """Find what adapters change in a checkpoint.

    Args:
        adapted: the model that they were trained on.
        tensors: which tensors of the checkpoint make its parameters.
        source: the full model.
        adapters: one, or several with the same targets.
        base: the quantized base, where it is known.

    Raises:
        ValueError: if an adapter does not fit the model, naming the tensor.
        NeedsPeft: if only PEFT's own merge can do it.
    """
    if adapted.needs_peft:
        raise NeedsPeft(adapted.needs_peft)
    model, stored = adapted.model, source.shapes
    plan = MergePlan({}, {}, config_changes={"architectures": [type(model).__name__]} | adapted.config_changes)
    plan.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    groups = list_tied_groups(model)
    each = [find_edits(peft_model, adapters[0], plan.shapes) for peft_model in adapted.peft_models]
    plan.edits, shared = each[0]
    for name, edit in plan.edits.items():
        edit.scales = tuple(scale for others, _ in each for scale in others[name].scales)
        if edit.magnitude is not None and len(adapters) > 1:
            raise ValueError(f"`{name}` has a DoRA magnitude; several such adapters have no exact mean. Merge one.")
    replace_shared_(plan.edits, drop_copies(shared, _find_stored(tensors, groups), source, adapters, base), groups)
    pieces, rearranged = locate_parameters(model, tensors, stored, plan.edits)
    odd = {tuple(group): found for group in groups if (found := find_odd_one(group, plan.edits, adapters))}
    still_tied = _untie_(plan, adapted, odd) if odd else groups
    for group in groups:
        if group in still_tied:
            _keep_tied_(plan, group, pieces, stored)
        else:
            _write_out_(plan, group, pieces, stored)
    _place_edits_(plan, set(pieces), rearranged, stored)
    for parts in pieces.values():
        for piece in parts:
            plan.pieces.setdefault(piece.tensor, []).append(piece)
    return plan


def _find_stored(tensors: TensorPlan, groups: Sequence[Sequence[str]]) -> dict[str, str]:
    """The checkpoint's tensor of each parameter that is one tensor as it is, or is tied to one."""
    stored = {name: inputs[0][1] for name, (converter, inputs) in tensors.groups.items() if converter is None}
    for group in groups:
        tensor = next((stored[name] for name in group if name in stored), None)
        if tensor is not None:
            stored |= {name: tensor for name in group if name not in stored}
    return stored


def _place_edits_(plan: MergePlan, located: set[str], rearranged: set[str], stored: Iterable[str]) -> None:
    """Add the values that are new to the checkpoint, and refuse edits of parameters missing there."""
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


def _keep_tied_(
    plan: MergePlan, group: Sequence[str], pieces: dict[str, list[Piece]], stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Change the one tensor of a tied group, or all of them where it is stored more than once."""
    edit = plan.edits.get(group[0])
    if edit is None:
        return
    _locate_twins_(plan, group, pieces, stored)
    main = next((name for name in group if name in pieces), group[0])
    for name in group:
        if name in pieces or name == main:
            plan.edits[name] = edit
        else:
            plan.edits.pop(name, None)


def _untie_(plan: MergePlan, adapted: AdaptedModel, odd: Mapping[tuple[str, ...], str]) -> list[list[str]]:
    """Untie weights in the configuration. Returns the groups that share a tensor even then.

    PEFT's merge would change the shared tensor, and with it the layer that the adapter does not touch. The configuration
    unties all at once.

    Args:
        plan: gets the changes of the configuration.
        adapted: the model.
        odd: the groups to untie, and the parameter in each that changes.
    """
    config, changes = untie_config(adapted.config)
    for group, name in odd.items():
        untied = check_untied(adapted.model, config, list(group), name)
        names = " and ".join(f"`{name}`" for name in group)
        logger.warning(f"The adapter changes {names}, which were tied, differently; they are untied.")
    plan.config_changes |= changes
    return list_tied_groups(untied)


def _write_out_(
    plan: MergePlan, group: Sequence[str], pieces: dict[str, list[Piece]], stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Give each weight of a group that was tied a tensor."""
    _locate_twins_(plan, group, pieces, stored)
    present = next((name for name in group if name in pieces), None)
    for name in group if present else ():
        if name not in pieces:
            edit = plan.edits.pop(name, Edit())
            plan.added.append((name, None if edit.value else present, edit))


def _locate_twins_(
    plan: MergePlan, group: Sequence[str], pieces: dict[str, list[Piece]], stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Find the tensors of weights that are tied, and yet stored more than once."""
    for name in group:
        if name not in pieces and name in stored:
            pieces[name] = whole_pieces(name, name, plan.shapes[name], None)
