# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What each party holds, on one axis from guessing to the server's model: a row of a picture for each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Shapes as well as colours, so that the picture is understood in grey, too.
INK, MUTED, GAIN, PAGE = "#222222", "#6b6b6b", "#d5e8e1", "#fffffe"
COLORS = {"owner": "#0b6e4f", "clients": "#c8553d", "nobody": "#6b6b6b"}
_MARKERS = {"owner": "s", "clients": "D", "nobody": "o"}
_FARTHEST = -0.25  # worse than guessing by more than this share of the way: drawn at the edge
_FAR, _NEAR = 0.05, 0.5  # shares of the way that are about guessing, and that come near the server's model
_STUB, _CUT = 0.14, 0.1  # of a broken axis: the part for what is about guessing, and where the cut is marked


@dataclass(frozen=True, slots=True)
class Party:
    """A model that a party holds, or can make.

    Args:
        label: Which party, and of what.
        holder: `owner`, `clients` or `nobody`.
        loss: Mean over the audited rows.
        low, high: 95 % interval, as seen from the server's model; None for what is exact or unknown.
        model: The best of several, by its name.
    """

    label: str
    holder: str
    loss: float
    low: float | None = None
    high: float | None = None
    model: str = ""


def find_share(loss: float, parties: Sequence[Party]) -> float | None:
    """The share of the way from guessing to the server's model: (guessing − loss) / (guessing − server).

    `parties` begin with guessing and end with the server's model. None where the server does not beat guessing.
    """
    guessing, server = parties[0].loss, parties[-1].loss
    return (guessing - loss) / (guessing - server) if server < guessing else None


def format_share(share: float | None) -> str:
    """In percent; with a decimal near the server's model, where a percent matters."""
    if share is None or not math.isfinite(share):
        return ""
    return f"{share:.1%}" if 0.9 < share < 1.1 and round(share, 3) != 1 else f"{share:.0%}"


def tabulate_parties(parties: Sequence[Party]) -> list[list[str]]:
    """The same as rows of a table, the header first."""
    rows = [["model", "held by", "loss", "95 % interval", "of the way", "best of its kind"]]
    for party in parties:
        interval = "" if party.low is None else f"{party.low:.4f} to {party.high:.4f}"
        share = format_share(find_share(party.loss, parties))
        rows.append([party.label, party.holder, f"{party.loss:.4f}", interval, share, party.model])
    return rows


def draw_parties(parties: Sequence[Party], width: float = 6.4, title: str = "") -> "Figure | None":
    """Draw a row for each party: a dot with its interval, between the lines of guessing and of the server's model.

    Args:
        parties: Guessing first, the server's model last.
        width: Of the figure, in inches.
        title: Above it.

    Returns:
        The figure, or None if matplotlib is not installed, or there is no server's model to compare with.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
    except ImportError:
        return None
    if not all(math.isfinite(party.loss) for party in parties):
        return None
    figure = Figure(figsize=(width, 1.15 + 0.5 * len(parties)), layout="constrained")
    axes = figure.add_subplot()
    place, ticks, broken = _make_axis(parties)
    server = place(parties[-1].loss)
    before = next((place(party.loss) for party in parties[:-1] if party.holder == "owner"), server)
    if before < server:
        axes.axvspan(before, server, color=GAIN, linewidth=0, zorder=0)
    axes.axvline(server, color=COLORS["owner"], linewidth=1.5, zorder=1)
    for row, party in enumerate(parties):
        _draw_party(axes, row, party, parties, place)
    handles: list[Any] = [
        Line2D([], [], marker=_MARKERS[holder], color=COLORS[holder], linestyle="", label=label)
        for holder, label in (("owner", "the owner has it"), ("clients", "clients have it, or can make it"))
    ]
    if before < server:
        handles.append(Patch(color=GAIN, label="what the federation added"))
    if any(party.low is not None for party in parties):
        handles.append(
            Line2D([], [], color=MUTED, linewidth=2.5, alpha=0.55, label="95 % interval, beside the server's")
        )
    if title:
        axes.set_title(title, loc="left", fontsize=11, color=INK, parse_math=False, x=0)
    figure.legend(
        handles=handles, loc="outside lower left", frameon=False, ncols=2 if width > 5 else 1, fontsize=8, labelcolor=INK, columnspacing=1.5
    )  # fmt: skip
    if broken:
        for shift in (-0.006, 0.006):
            axes.plot([_CUT + shift - 0.006, _CUT + shift + 0.006], [-0.02, 0.02], color=MUTED, linewidth=1,
                      clip_on=False, transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks], fontsize=8, color=MUTED)
    axes.set_yticks([])
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(len(parties) - 0.45, -0.75)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(color=MUTED)
    axes.set_xlabel(
        "0 %: guessing; 100 %: the server's model" if broken is not None else "loss", fontsize=8, color=MUTED
    )
    return figure


def _draw_party(axes: Any, row: int, party: Party, parties: Sequence[Party], place: Callable[[float], float]) -> None:
    color, x = COLORS[party.holder], place(party.loss)
    axes.axhline(row, color=MUTED, linewidth=0.4, alpha=0.4, zorder=0)
    if party.low is not None and party.high is not None:
        axes.plot([place(party.high), place(party.low)], [row, row], color=color, linewidth=2.5, alpha=0.55, zorder=2)
    beyond = (share := find_share(party.loss, parties)) is not None and share < _FARTHEST
    marker = "<" if beyond else _MARKERS[party.holder]
    face = "none" if party.holder == "nobody" else color
    axes.plot([x], [row], marker=marker, markersize=7, color=color, markerfacecolor=face, zorder=3, linestyle="")
    # `parse_math`: what users chose is in these names, and no formula.
    text: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "parse_math": False, "zorder": 4}
    box = {"boxstyle": "square,pad=0.1", "facecolor": PAGE, "edgecolor": "none", "alpha": 0.8}
    names = [axes.text(0, row - 0.2, party.label, color=INK, fontsize=9, va="bottom", bbox=box, **text)]
    lines = [line for line in (format_share(share), f"loss {party.loss:.3f}") if line]
    axes.text(1.03, row - 0.28, "\n".join(lines), color=INK, fontsize=8.5, va="center", linespacing=1.4, **text)
    if party.model:  # beside the dot, on the side where there is room
        left = x > 0.5
        name = axes.annotate(
            party.model, (x, row), xytext=(-7 if left else 7, -8), textcoords="offset points", fontsize=7.5, color=MUTED,
            ha="right" if left else "left", va="center", parse_math=False, bbox=box, zorder=1.5,
        )  # fmt: skip
        names.append(name)
    for name in names:
        name.set_in_layout(False)  # however long it is, the axis keeps its room


def _make_axis(
    parties: Sequence[Party],
) -> tuple[Callable[[float], float], list[tuple[float, str]], bool | None]:
    """Where a loss is on the axis, from 0 to 1; ticks; and whether the axis is broken, None if it has no shares."""
    from matplotlib.ticker import MaxNLocator

    losses = [value for party in parties for value in (party.loss, party.low, party.high) if value is not None]
    if find_share(0.0, parties) is None:  # the server is no better than guessing: the axis is the loss itself
        worst, best = max(losses), min(losses)
        span = worst - best or 1.0
        values = MaxNLocator(4).tick_values(best, worst)
        ticks = [((worst - value) / span, f"{value:.4g}") for value in values if best <= value <= worst]
        return lambda loss: (worst - loss) / span, ticks, None

    def share_of(loss: float) -> float:
        share = find_share(loss, parties)
        return -math.inf if share is None else max(share, _FARTHEST)

    rest = [
        [share_of(value) for value in (party.loss, party.low, party.high) if value is not None]
        for party in parties[1:]
    ]
    near = [share for shares in rest if shares[0] > _NEAR for share in shares]
    low, high = min(near), max(near)  # the server's is among them
    margin = 0.04 * (high - low)
    # What is no better than guessing is not worth the room: with the others far away, the axis leaves out what is between.
    broken = high > low > _FAR + margin and all(shares[0] > _NEAR or max(shares) < _FAR for shares in rest)
    if broken:
        known, places = [_FARTHEST, low - margin, high + margin], [0.0, _STUB, 1.0]
    else:
        known, places = [min(0.0, *(min(shares) for shares in rest)), high + margin], [0.0, 1.0]
    values = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(known[-2], known[-1])
    shown = [value for value in values if known[-2] <= value <= known[-1]]
    digits = max(0, math.ceil(-math.log10(values[1] - values[0]) - 2 - 1e-9))
    ticks = [(float(np.interp(value, known, places)), f"{value:.{digits}%}") for value in shown]
    if broken:
        ticks.insert(0, (float(np.interp(0.0, known, places)), "0%"))
    return lambda loss: float(np.interp(share_of(loss), known, places)), ticks, broken
