# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which round is the best, and so the one that is published: by the owner's selection rows, or `load_best_model_at_end`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config.metrics import MetricChoice, is_number
from .store import RoundStore


if TYPE_CHECKING:
    from ..config.federated import FederatedConfig


def read_judged(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metrics by which a round is judged: the server's, or the proxy's where nobody holds the full model.

    The loss on the owner's selection rows is `eval_selection_loss`.
    """
    metrics = record["metrics"].get("server") or record["metrics"].get("proxy") or {}
    return metrics | ({"eval_selection_loss": record["selection_loss"]} if "selection_loss" in record else {})


def check_chosen(args: "FederatedConfig", record: Mapping[str, Any]) -> None:
    """Refuse, before any client trains, a `metric_for_best_model` that evaluation does not give.

    Raises:
        ValueError: naming it, and the metrics that there are.
    """
    key, metrics = MetricChoice.of(args).key, read_judged(record)
    wanted = args.load_best_model_at_end or (key is not None and bool(metrics))
    if wanted and not is_number(metrics.get(str(key))):
        names = ", ".join(name for name, value in metrics.items() if is_number(value)) or "none: pass `eval_dataset`"
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} with "
            f"load_best_model_at_end={args.load_best_model_at_end}: evaluation gives no number `{key}`. Choose one of the "
            f"metrics there are ({names})."
        )


def find_selected_round(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The round with the least loss on the owner's selection rows; None if there were none."""
    selected = [(record["selection_loss"], record["round"]) for record in records if "selection_loss" in record]
    return min(selected)[1] if selected else None


def read_base_weight(store: RoundStore) -> float:
    """λ of the model W − λE + θ that a federation has published."""
    records = store.records()
    if not records:
        return 0.0
    selected = find_selected_round(records)
    return float(records[-1 if selected is None else selected].get("base_weight", 0.0))


def find_published_round(args: "FederatedConfig", records: Sequence[Mapping[str, Any]]) -> int:
    """The last round, or the best one; of equals, the first.

    By the owner's selection rows round 0 may be the best, so that the federation ends no worse on them than it began; with
    `load_best_model_at_end` the best one is from round 1 on.
    """
    last: int = records[-1]["round"]
    selected = find_selected_round(records)
    if selected is not None:
        return selected
    best = find_best_round(args, records) if args.load_best_model_at_end else None
    return last if best is None else best


def find_best_round(args: "FederatedConfig", records: Sequence[Mapping[str, Any]]) -> int | None:
    """The best round by `metric_for_best_model`, from round 1 on; of equals, the first. None if none was measured."""
    choice = MetricChoice.of(args)
    best: tuple[int, float] | None = None
    for record in records if choice.key is not None else ():
        value = read_judged(record).get(str(choice.key))
        if (
            not record["round"] or value is None or not is_number(value) or value != value
        ):  # NaN is better than nothing
            continue
        if best is None or choice.is_better(str(choice.key), value, best[1]):
            best = (record["round"], value)
    return None if best is None else best[0]


def forget_rounds(args: "FederatedConfig", store: RoundStore) -> None:
    """Delete the tensors of all rounds but the last `save_total_limit`; without a limit, or one of 0, of none.

    Beside the last rounds are kept: round 0, where resumed clients start; the best round by `metric_for_best_model`; and the
    one that would be published now. So a later round never wants one that is gone.
    """
    limit = args.save_total_limit
    if limit is None or limit <= 0:
        return
    records = store.records()
    numbers = [record["round"] for record in records]
    kept = {0, *numbers[-limit:], find_published_round(args, records), find_best_round(args, records)}
    store.forget(number for number in numbers if number not in kept)
