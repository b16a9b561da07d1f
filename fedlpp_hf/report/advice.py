# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What presets achieved in a simulation, side by side, and which one to take: as values, as Markdown, as a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .tables import format_bytes, format_table


_NORMAL_95 = 1.96
LIMITS = (
    "This is a simulation on the owner's own rows. Its pseudo-clients are parts of one dataset, and so more alike than "
    "partners will be: expect a smaller gain from them. It says nothing of clients that fail, or lie. It is one seed; the "
    "intervals cover the choice of test rows, not the randomness of training. Attackers are those of the audit."
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval; None where there is none, as of a share of no gain."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class PresetResult:
    """What one preset achieved.

    `before` and `after` are the losses of the owner's model and of the server's on each test row; `accuracy` its means before
    and after, for a classifier. `stolen` is the larger stolen value of the audit's single client and coalition; `exposure` is
    what the base is worth, `healed` what it is worth after the best local-only training. `base_bytes`, `down` and `up` are of
    one client, in all rounds. `failure` is why there are no values.
    """

    name: str
    summary: str
    options: Mapping[str, Any]
    before: Sequence[float] = ()
    after: Sequence[float] = ()
    accuracy: Sequence[float] = ()
    stolen: Estimate = Estimate(None, None, None)
    exposure: Estimate = Estimate(None, None, None)
    healed: Estimate = Estimate(None, None, None)
    base_bytes: int = 0
    down: int = 0
    up: int = 0
    seconds: float = 0.0
    failure: str = ""

    @property
    def gain(self) -> Estimate:
        """Mean over test rows of what the loss falls by."""
        return estimate_mean(np.subtract(self.before, self.after))


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The preset to take, or None, and why."""

    name: str | None
    reason: str


def estimate_mean(values: np.ndarray) -> Estimate:
    """Mean of independent rows with its 95 % interval by the normal approximation, mean ± 1.96·s/√n."""
    if not len(values) or not np.isfinite(values).all():
        return Estimate(None, None, None)
    mean = float(values.mean())
    half = _NORMAL_95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(mean, mean - half, mean + half)


def recommend(results: Sequence[PresetResult], max_stolen: float) -> Recommendation:
    """Choose a preset: of those that keep what is stolen within `max_stolen`, the one with the largest gain.

    The upper bound of the stolen value counts, and a gain whose interval includes 0 is none. Presets whose gain can't be told
    from the largest one on these rows, in pairs, are equal; of these, the one whose base is worth least to a client that
    trains it (the healed exposure) is chosen.
    """
    done = [result for result in results if not result.failure]
    if not done:
        return Recommendation(None, "No preset could be run to its end.")
    allowed = [result for result in done if result.stolen.high is not None and result.stolen.high <= max_stolen]
    rows, others = len(done[0].before), _describe_refused(done, allowed)
    if not allowed:
        return Recommendation(
            None, f"No preset keeps the stolen value's upper bound within {max_stolen:.0%}. {others}".strip()
        )
    useful = [result for result in allowed if (result.gain.low or 0.0) > 0]
    if not useful:
        return Recommendation(
            None,
            f"No preset that keeps the stolen value's upper bound within {max_stolen:.0%} improves the owner's model beyond the "
            f"noise of {rows} test rows. Try more steps, another learning rate, or more rows before you ask a partner. "
            f"{others}".strip(),
        )
    best = max(useful, key=_gain_of)
    equal = [result for result in useful if not is_better(best, result)]
    chosen = min(equal, key=lambda result: (_or_infinite(result.healed.value), -_gain_of(result)))
    reason = (
        f"Its stolen value is at most {chosen.stolen.high:.0%} (limit {max_stolen:.0%}), and it lowers the loss by "
        f"{format_estimate(chosen.gain)}."
    )
    if len(equal) > 1:
        names = ", ".join(result.name for result in equal if result is not chosen)
        reason += (
            f" On these {rows} test rows its gain can't be told from that of {names}; its base is worth least to a client that "
            f"trains it (healed exposure {_percent(chosen.healed.value)})."
        )
    elif len(useful) > 1:
        reason += " No other preset within the limit gains as much."
    return Recommendation(chosen.name, f"{reason} {others}".strip())


def is_better(one: PresetResult, other: PresetResult) -> bool:
    """Whether `one` ends with a lower loss than `other`, beyond the noise of the test rows: the interval of pairs."""
    return one is not other and (estimate_mean(np.subtract(other.after, one.after)).low or 0.0) > 0


def _describe_refused(done: Sequence[PresetResult], allowed: Sequence[PresetResult]) -> str:
    refused = [f"{result.name} {format_share(result.stolen)}" for result in done if result not in allowed]
    return f"Over the limit: {'; '.join(refused)}." if refused else ""


def _gain_of(result: PresetResult) -> float:
    return -math.inf if result.gain.value is None else result.gain.value


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def render_advice(results: Sequence[PresetResult], recommendation: Recommendation, facts: Sequence[str]) -> str:
    """The table, the recommendation with its reason, and what a simulation can't say, as Markdown.

    Args:
        results: Of the presets.
        recommendation: Of [`recommend`].
        facts: Sentences on what was simulated.
    """
    header = [
        "preset",
        "server's loss",
        "gain (95 %)",
        "stolen value",
        "exposure",
        "healed",
        "base",
        "down",
        "up",
        "seconds",
    ]
    accuracy = any(result.accuracy for result in results)
    table = [header[:3] + ["accuracy"] * accuracy + header[3:]]
    for result in results:
        if result.failure:
            table.append([result.name, "failed", *[""] * (len(table[0]) - 2)])
            continue
        gained = [" → ".join(f"{value:.3f}" for value in result.accuracy)] if accuracy else []
        table.append(
            [
                f"{result.name} (recommended)" if result.name == recommendation.name else result.name,
                f"{np.mean(result.before):.4f} → {np.mean(result.after):.4f}",
                format_estimate(result.gain),
                *gained,
                format_share(result.stolen),
                _percent(result.exposure.value),
                _percent(result.healed.value),
                *(format_bytes(count) for count in (result.base_bytes, result.down, result.up)),
                f"{result.seconds:.0f}",
            ]
        )
    chosen = next((result for result in results if result.name == recommendation.name), None)
    title = f"**Recommended: {recommendation.name}.**" if chosen else "**No preset is recommended.**"
    return "\n".join(
        [
            "# Advice",
            "",
            " ".join(facts),
            "",
            *format_table(table),
            "",
            *(f"- {result.name}: {result.summary}. {result.failure}".rstrip() for result in results),
            "",
            "Loss and gain are means over test rows. Stolen value: the share of the server's gain over local training that one "
            "client, or half of them together, gets; exposure: what the base is worth as it is; healed: after clients have trained "
            "it on their own rows. Base, down and up are bytes of one client. Seconds are those of rounds and audit.",
            "",
            f"{title} {recommendation.reason}",
            *(
                ["", "Its options, beside those that all presets share:", "", "```yaml", *_list_options(chosen), "```"]
                if chosen
                else []
            ),
            "",
            f"**Limits.** {LIMITS}",
            "",
        ]
    )


def format_estimate(estimate: Estimate) -> str:
    """A value with its interval."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "not a number"
    return f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"


def format_share(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "undetermined"
    if estimate.low == estimate.high:
        return f"{estimate.value:.0%}"
    return f"{estimate.value:.0%} ({estimate.low:.0%} to {estimate.high:.0%})"


def _percent(value: float | None) -> str:
    return "undetermined" if value is None else f"{value:.0%}"


def _list_options(result: PresetResult) -> list[str]:
    return [
        f"{name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in result.options.items()
    ]


def draw_advice(
    results: Sequence[PresetResult], recommendation: Recommendation, max_stolen: float, path: Path
) -> bool:
    """Draw gain, stolen value and exposure of each preset side by side; False if matplotlib is not installed.

    Args:
        results: Of the presets; those that failed are left out.
        recommendation: Of [`recommend`].
        max_stolen: The limit.
        path: Of the picture.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [result for result in results if not result.failure]
    figure = Figure(figsize=(10, 1.6 + 0.55 * max(len(shown), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    gain, stolen, exposure = figure.subplots(1, 3, sharey=True)
    for place, result in enumerate(shown):
        color = "#0b6e4f" if result.name == recommendation.name else "#555555"
        _draw_estimate(gain, result.gain, place, color)
        _draw_estimate(stolen, result.stolen, place, color, "undetermined")
        pair = [value for value in (result.exposure.value, result.healed.value) if value is not None]
        exposure.plot(pair, [place] * len(pair), color=color, linewidth=1)
        _draw_estimate(exposure, Estimate(result.exposure.value, None, None), place, color, filled=False)
        _draw_estimate(exposure, Estimate(result.healed.value, None, None), place, color)
    labels = [f"{r.name}\n(recommended)" if r.name == recommendation.name else r.name for r in shown]
    gain.set_yticks(range(len(shown)), labels)
    gain.invert_yaxis()
    gain.axvline(0, color="#555555", linewidth=0.8)
    gain.set_xlabel("server's gain (loss, more is better)")
    stolen.axvline(max_stolen, color="#c8553d", linestyle="--", label=f"limit {max_stolen:.0%}")
    stolen.set_xlabel("stolen value (less is better)")
    stolen.legend(frameon=False, fontsize=8)
    exposure.set_xlabel("base's worth: ○ sent, ● trained")
    for axes in (stolen, exposure):
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    exposure.set_xlim(right=max(1.05, exposure.get_xlim()[1]))  # to see what is near the owner's whole model
    for axes in (gain, stolen, exposure):
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
        axes.margins(y=0.3 / max(len(shown), 1) + 0.1)
    figure.savefig(path, dpi=130)
    return True


def _draw_estimate(
    axes: Any, estimate: Estimate, place: int, color: str, otherwise: str = "", filled: bool = True
) -> None:
    if estimate.value is None:
        axes.annotate(
            otherwise, (0.5, place), xycoords=("axes fraction", "data"), va="center", ha="center", color=color
        )
        return
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [place, place], color=color, linewidth=2)
    axes.plot([estimate.value], [place], "o", color=color, markerfacecolor=color if filled else "white")
