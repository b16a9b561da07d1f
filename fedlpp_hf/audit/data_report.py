# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the audit of the data side found: as values, from JSON, and as tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..report.tables import format_table
from .membership import Membership


@dataclass(frozen=True, slots=True)
class InversionFigures:
    """What was recovered from one update, in percent of the rows behind it.

    `run` says which; `rows` and `different_tokens` are what is behind it. `tokens` is the F-measure of the tokens found, the others are
    those of [`Recovery`]. `by` says how tokens and order were found.
    """

    run: str
    rows: int
    different_tokens: int
    by: str
    tokens: float
    rouge_1: float
    rouge_2: float
    rouge_l: float
    exact: float


@dataclass(frozen=True, slots=True)
class MembershipFigures:
    """One test of membership, on the `model` that it looked at."""

    model: str
    figures: Membership


@dataclass(frozen=True, slots=True)
class CanaryAudit:
    """What the canaries show at `delta`.

    `shift` is the mean of the canaries' components in units of chance; had they sent nothing, it would be 0 ± 1/√canaries. `epsilon` is the ε of the Gaussian
    mechanism with this shift, and `epsilon_low` to `epsilon_high` its 99.9 % interval: an estimate, exact for Gaussian noise
    without sampling, and too low for mixtures. `bound` is a 99.9 % lower bound that assumes nothing of the noise: from the share
    of canaries above a threshold, which was chosen on the other half of them, against the known share of chance.
    `accounted` is the ε that is claimed. `repeats` says that two releases of the same round had the same noise.
    """

    num_canaries: int
    delta: float
    shift: float
    epsilon: float
    epsilon_low: float
    epsilon_high: float
    bound: float
    accounted: float | None
    repeats: bool

    @property
    def refuted(self) -> bool:
        """Whether the run shows that the accounted ε is wrong: the interval or the bound is above it, or noise can be subtracted.

        A sound mechanism is refuted by chance in about one run of 1,000.
        """
        return self.repeats or (self.accounted is not None and max(self.epsilon_low, self.bound) > self.accounted)


@dataclass(frozen=True, slots=True)
class DataAudit:
    """What updates tell about rows, measured on rows of the owner's own.

    `canaries` is None where the federation has no noise whose ε could be compared. `notes` say what was not measured, and why.
    """

    inversions: list[InversionFigures]
    membership: list[MembershipFigures]
    canaries: CanaryAudit | None = None
    notes: list[str] = field(default_factory=list)

    def list_tables(self) -> list[tuple[str, list[list[str]]]]:
        """The tables, each with its caption; the first row is the header."""
        found = []
        if self.inversions:
            rows = [
                [
                    i.run, str(i.rows), str(i.different_tokens), i.by, f"{i.tokens:.0f} %",
                    *(f"{value:.0f}" for value in (i.rouge_1, i.rouge_2, i.rouge_l)), f"{i.exact:.0f} %",
                ]
                for i in self.inversions
            ]  # fmt: skip
            header = ["update", "rows", "different tokens", "tokens and order by", "tokens found"]
            found.append((_INVERSION, [[*header, "ROUGE-1", "ROUGE-2", "ROUGE-L", "exact rows"], *rows]))
        if self.membership:
            rows = [
                [
                    entry.model, m.attack, f"{m.auc:.2f} ({m.auc_low:.2f} to {m.auc_high:.2f})",
                    f"{m.tpr:.0%} ({m.tpr_low:.0%} to {m.tpr_high:.0%})", f"{m.num_members} and {m.num_others}",
                ]
                for entry in self.membership
                for m in [entry.figures]
            ]  # fmt: skip
            found.append(
                (
                    _MEMBERSHIP,
                    [["model", "test", "AUC", "members found at 1 % false alarms", "members, others"], *rows],
                )
            )
        if c := self.canaries:
            accounted = "" if c.accounted is None else f"{c.accounted:.2f}"
            estimate = f"{c.epsilon:.2f} ({c.epsilon_low:.2f} to {c.epsilon_high:.2f})"
            row = [f"{c.delta:g}", accounted, estimate, f"{c.bound:.2f}", "refuted" if c.refuted else "not refuted"]
            found.append((_CANARIES, [["δ", "accounted ε", "estimated ε", "lower bound", "the accounted ε is"], row]))
        return found

    def render(self) -> list[str]:
        """The section of `audit.md`, as lines."""
        lines = ["## What updates tell about rows", "", _INTRODUCTION]
        for caption, table in self.list_tables():
            lines += ["", caption, "", *format_table(table)]
        return lines + [f"\n**Note.** {note}" for note in self.notes]


_INTRODUCTION = (
    "Attacks by the server, or whoever reads its disk, on clients that were given rows of the owner's own. "
    "docs/data-privacy.md says how, and what protects."
)
_INVERSION = (
    "Rows rebuilt from one update. ROUGE is on tokens, in percent; `noise` is the same attack on noise as long as the update: what "
    "the attacker's knowledge of language is worth"
)
_MEMBERSHIP = "Was a row trained on? AUC 0.5 is chance; 95 % bootstrap intervals. The ratio compares with the model before the update"
_CANARIES = "ε from canary clients, beside the accounted one: one run refutes a wrong account, and proves none right"


def read_data_audit(values: Mapping[str, Any]) -> DataAudit:
    """The audit from JSON.

    Raises:
        ValueError, TypeError, KeyError: if it is not one.
    """
    canaries = values["canaries"]
    audit = DataAudit(
        inversions=[_read(InversionFigures, entry) for entry in values["inversions"]],
        membership=[
            MembershipFigures(str(entry["model"]), _read(Membership, entry["figures"]))
            for entry in values["membership"]
        ],
        canaries=None if canaries is None else _read(CanaryAudit, canaries),
        notes=[str(note) for note in values["notes"]],
    )
    audit.render()  # whatever is of the wrong type shows here
    return audit


def _read(kind: type, values: Mapping[str, Any]) -> Any:
    found = kind(**values)
    for entry in fields(kind):
        value = getattr(found, entry.name)
        if entry.type is float and not isinstance(value, int | float):
            raise ValueError(f"`{entry.name}` is {value!r}")
        if entry.type in (str, int, bool) and not isinstance(value, entry.type):
            raise ValueError(f"`{entry.name}` is {value!r}")
    return found
