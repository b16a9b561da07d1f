# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The rounds as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.metrics import MetricChoice, is_number
from .metrics import Record
from .parties import COLORS
from .text import AttackerRow


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 48  # characters of a label
_MARKED = 60  # rounds; more are drawn as a line without dots


def draw_rounds(
    records: Sequence[Record],
    path: Path,
    references: Mapping[str, Mapping[str, float]] | None = None,
    choice: MetricChoice | None = None,
    attackers: Sequence[AttackerRow] = (),
) -> bool:
    """Draw the main metric of proxy and server over the rounds; False if matplotlib is not installed.

    Args:
        records: Of all rounds, from round 0.
        path: Of the picture.
        references: Metrics of models that nobody holds, by label.
        choice: The metric that counts.
        attackers: What the audit found that clients can make of what they hold.
    """
    figure = plot_rounds(records, references, choice, attackers)
    if figure is None:
        return False
    figure.savefig(path, dpi=150)
    return True


def plot_rounds(
    records: Sequence[Record],
    references: Mapping[str, Mapping[str, float]] | None = None,
    choice: MetricChoice | None = None,
    attackers: Sequence[AttackerRow] = (),
    narrow: bool = False,
) -> "Figure | None":
    """The figure of [`draw_rounds`]; `narrow` is for a page, with the legend below. None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    metrics: Mapping[str, float] = next(
        (record["metrics"][view] for record in records for view in record["metrics"]), {}
    )
    name = (choice or MetricChoice()).main(metrics) or ""
    figure = Figure(figsize=(4.2, 3.7) if narrow else (7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for view, label, marker in (
        ("server", "server's model (owner)", "s"),
        ("proxy", "base + proxy (clients)", "D"),
    ):
        color = COLORS["owner" if view == "server" else "clients"]
        points = [
            (r["round"], r["metrics"][view][name]) for r in records if is_number(r["metrics"].get(view, {}).get(name))
        ]
        if len(points) > 1:
            marker = marker if len(points) <= _MARKED else ""
            axes.plot(*zip(*points, strict=True), marker=marker, label=label, color=color)
        elif points:  # nothing is broadcast
            axes.axhline(
                points[0][1], linestyle=":", label="base (clients)" if view == "proxy" else label, color=color
            )
    for style, row in zip(("-.", (0, (1, 3))), attackers, strict=False):
        if is_number(row.metrics.get(name)):
            axes.axhline(row.metrics[name], linestyle=style, color=COLORS["clients"], label=_shorten(row.label))
    for style, (label, reference) in zip(("--", ":"), (references or {}).items(), strict=False):
        if is_number(reference.get(name)):
            axes.axhline(reference[name], linestyle=style, color="#555555", label=_shorten(label))
    axes.set_xlabel("round")
    axes.set_ylabel(_shorten(name.removeprefix("eval_")))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        if narrow:
            figure.legend(loc="outside lower left", frameon=False, fontsize=9)
        else:
            axes.legend(frameon=False)
    return figure


def _shorten(label: str) -> str:
    """A label that leaves room for the picture. Matplotlib takes what is between two dollars for a formula."""
    return (label if len(label) <= _LONGEST else f"{label[:_LONGEST]}…").replace("$", "\\$")
