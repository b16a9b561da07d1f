# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The rounds as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config.metrics import MetricChoice, is_number
from .metrics import Record
from .text import AttackerRow


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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    metrics: Mapping[str, float] = next(
        (record["metrics"][view] for record in records for view in record["metrics"]), {}
    )
    name = (choice or MetricChoice()).main(metrics) or ""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for view, label, color in (
        ("server", "server's model (owner)", "#0b6e4f"),
        ("proxy", "base + proxy (clients)", "#c8553d"),
    ):
        points = [
            (r["round"], r["metrics"][view][name]) for r in records if is_number(r["metrics"].get(view, {}).get(name))
        ]
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=label, color=color)
        elif points:  # nothing is broadcast
            axes.axhline(
                points[0][1], linestyle=":", label="base (clients)" if view == "proxy" else label, color=color
            )
    for style, row in zip(("-.", (0, (1, 3))), attackers, strict=False):
        if is_number(row.metrics.get(name)):
            axes.axhline(row.metrics[name], linestyle=style, color="#c8553d", label=row.label)
    for style, (label, reference) in zip(("--", ":"), (references or {}).items(), strict=False):
        if is_number(reference.get(name)):
            axes.axhline(reference[name], linestyle=style, color="#555555", label=label)
    axes.set_xlabel("round")
    axes.set_ylabel(name.removeprefix("eval_"))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True
