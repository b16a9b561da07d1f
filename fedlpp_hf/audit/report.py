# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the audit found: as values, as JSON and back, as Markdown, as a picture."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..report.parties import Party, draw_parties, tabulate_parties
from ..report.sent import SentTensor, summarize_sent
from ..report.tables import format_table
from ..report.text import AttackerRow, AuditSummary
from ..server.store import RoundStore
from ..tensors.atomic import write_atomically
from .data_report import DataAudit, read_data_audit
from .stolen_value import StolenValue, format_stolen, read_stolen


SCHEMA_VERSION = 5
_READABLE = (3, 4, SCHEMA_VERSION)  # 3 has no intervals, 4 no audit of the data
AUDIT_JSON, AUDIT_TABLE, AUDIT_PICTURE = "audit.json", "audit.md", "audit.png"


@dataclass(frozen=True, slots=True)
class CoalitionAudit:
    """What `clients` can do together, with the `num_proxies` different proxies that they were sent between them.

    `attacks` and `local_only` map each attacker to its means by measure, `stolen` each measure to its stolen value. `healed`
    is the exposure of the best of `local_only`: what the base is worth once it is trained on their rows.
    `metrics` are those of the attacker with the least loss, on the whole evaluation dataset. `diverged` names attacks
    whose training did not end in finite numbers; a lower learning rate might have. `intervals` are 95 % intervals of the
    loss of the best `attacker` and the best of `local_only`, as [`estimate_interval`] says.
    """

    clients: list[str]
    num_proxies: int
    attacks: dict[str, dict[str, float]]
    local_only: dict[str, dict[str, float]]
    stolen: dict[str, StolenValue]
    healed: StolenValue
    metrics: dict[str, float]
    diverged: list[str]
    intervals: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The audit of one federation.

    `num_rows` of `num_rows_available` evaluation rows were drawn by `seed`; an attacker trained for `steps` steps at most.
    `exposure` is the stolen value of the untouched base, in loss, against guessing. `before` and `server` are means of
    the owner's model at the start and at the end. `sent` is what left the owner: each tensor of the base and of a proxy.
    `intervals` are those of the untouched `base` and of the owner's model `before`. `data` is the audit of the data side, with
    `audit_data`.
    """

    federation_id: str
    base_fingerprint: str
    num_clients: int
    num_rows: int
    num_rows_available: int
    steps: int
    seed: int
    threshold: float | None
    before: dict[str, float]
    server: dict[str, float]
    exposure: StolenValue
    coalitions: list[CoalitionAudit]
    sent: list[SentTensor]
    notes: list[str]
    seconds: float
    intervals: dict[str, list[float]] = field(default_factory=dict)
    data: DataAudit | None = None

    @property
    def worst_single(self) -> CoalitionAudit | None:
        """The single client with the best attacker, by its loss, if any was tried."""
        return self._find_worst(1, 1)

    @property
    def worst_half(self) -> CoalitionAudit | None:
        """The coalition of up to half of the clients with the best attacker, by its loss, if any was tried."""
        return self._find_worst(2, self.num_clients / 2)

    def _find_worst(self, fewest: int, most: float) -> CoalitionAudit | None:
        found = [c for c in self.coalitions if fewest <= len(c.clients) <= most]
        return min(found, key=lambda c: c.stolen["loss"].attacker, default=None)

    def summarize(self) -> AuditSummary:
        """What the federation's report shows of it."""
        half = self.worst_half
        rows = [
            ("best attacker (one client)", self.worst_single),
            (f"best coalition of half ({len(half.clients) if half else 0} clients)", half),
        ]
        found = [(_name_clients(c.clients), measure, s) for c in self.coalitions for measure, s in c.stolen.items()]
        return AuditSummary(
            attackers=[
                AttackerRow(label, found.metrics, format_stolen(found.stolen["loss"]))
                for label, found in rows
                if found
            ],
            parties=self.list_parties(),
            stolen=[
                ["who", "in", "stolen value", "best attacker"],
                *([who, measure, format_stolen(s), s.best_attack] for who, measure, s in found),
            ],
            exposures=_list_exposures(self),
            notes=[*(f"{who}, {measure}: {s.reason}" for who, measure, s in found if s.reason), *self.notes],
            data=self.data.list_tables() if self.data else [],
            data_notes=self.data.notes if self.data else [],
            rows=f"{self.num_rows} of {self.num_rows_available} evaluation rows (seed {self.seed})",
        )

    def list_parties(self) -> list[Party]:
        """What each party holds or can make, from guessing to the server's model: at most eight rows."""
        exposure, intervals = self.exposure, self.intervals
        parties = [
            Party("guessing", "nobody", exposure.local_only),
            Party(
                "the base, as every client has it", "clients", exposure.attacker, *_read_bounds(intervals.get("base"))
            ),
        ]
        for found in (self.worst_single, self.worst_half):
            if found is None:
                continue
            count, stolen = len(found.clients), found.stolen["loss"]
            who, rows = ("one client", "its rows") if count == 1 else (f"{count} clients together", "their rows")
            alone, best = (_read_bounds(found.intervals.get(name)) for name in ("local_only", "attacker"))
            label = f"{who}: base and {rows} alone"
            parties.append(Party(label, "clients", stolen.local_only, *alone, stolen.best_local))
            if found.attacks:
                label = f"{who}: with what was sent"
                parties.append(Party(label, "clients", stolen.attacker, *best, stolen.best_attack))
        owner, server = self.before["loss"], self.server["loss"]
        parties.append(Party("the owner's model before", "owner", owner, *_read_bounds(intervals.get("before"))))
        return [*parties, Party("the server's model after", "owner", server)]

    def check_threshold(self) -> None:
        """
        Raises:
            RuntimeError: if a client or a coalition of up to half of the clients has a larger share of the owner's gain
                than `threshold`, or one that can't be told.
        """
        if self.threshold is None:
            return
        for coalition in self.coalitions:
            if len(coalition.clients) > max(1, self.num_clients / 2):
                continue
            stolen = coalition.stolen["loss"]
            if stolen.value is None or stolen.value > self.threshold:
                raise RuntimeError(
                    f"The audit fails: {', '.join(coalition.clients)} with `{stolen.best_attack}`: stolen value "
                    f"{format_stolen(stolen)}, audit_threshold={self.threshold:.0%}. {stolen.reason} The run is "
                    f"complete and {AUDIT_TABLE} has the details. What was never sent can't be stolen: set "
                    "broadcast='never'."
                )

    def write(self, output_dir: str | os.PathLike) -> bool:
        """Write `audit.json`, `audit.md` and `audit.png`; False if there is no picture: [`draw_parties`] says why."""
        directory = Path(output_dir)
        text = json.dumps({"schema": SCHEMA_VERSION, **asdict(self)}, indent=2) + "\n"
        write_atomically(directory / AUDIT_JSON, text.encode())
        write_atomically(directory / AUDIT_TABLE, render_audit(self).encode())
        figure = draw_parties(self.list_parties(), title="What each party holds, or can make")
        if figure is None:
            (directory / AUDIT_PICTURE).unlink(missing_ok=True)  # not the one of another run
            return False
        figure.savefig(directory / AUDIT_PICTURE, dpi=150)
        return True

    @classmethod
    def read(cls, output_dir: str | os.PathLike) -> "AuditReport":
        """What [`write`] wrote.

        Raises:
            ValueError: if there is no audit, or it is damaged, of another schema or of another federation.
        """
        path = Path(output_dir) / AUDIT_JSON
        if not path.is_file():
            raise ValueError(
                f"`{output_dir}` has no {AUDIT_JSON}. An audit needs the clients' data: run the federation's script with "
                "--audit True (and --resume_from_checkpoint True, if its rounds are done)."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("schema", None) not in _READABLE:
                raise ValueError(f"expected schema {SCHEMA_VERSION}")
            values["exposure"] = read_stolen(values["exposure"])
            values["coalitions"] = [
                CoalitionAudit(
                    **{
                        **entry,
                        "stolen": {name: read_stolen(value) for name, value in entry["stolen"].items()},
                        "healed": read_stolen(entry["healed"]),
                    }
                )
                for entry in values["coalitions"]
            ]
            values["data"] = read_data_audit(values["data"]) if values.get("data") is not None else None
            values["sent"] = [SentTensor(**entry) for entry in values["sent"]]
            report = cls(**values)
            render_audit(report)  # whatever is of the wrong type shows here
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"`{path}` is no audit of this version of fedlpp_hf ({error}); run it again.") from error
        store = RoundStore(output_dir)
        if store.exists and store.read()["federation_id"] != report.federation_id:
            raise ValueError(f"`{path}` is of another federation than the one in `{output_dir}`; audit this one.")
        return report


def _read_bounds(interval: list[float] | None) -> tuple[float | None, float | None]:
    """
    Raises:
        ValueError: if it has not two ends.
    """
    low, high = interval or (None, None)
    return low, high


def _name_clients(clients: list[str]) -> str:
    if len(clients) == 1:
        return clients[0]
    more = f" and {len(clients) - 5} more" if len(clients) > 5 else ""
    return f"{len(clients)} clients: {', '.join(clients[:5])}{more}"


def render_audit(report: AuditReport) -> str:
    """The audit as Markdown."""
    measures = list(report.server)
    drawn = f"{report.num_rows} of {report.num_rows_available} evaluation rows (seed {report.seed})"
    lines = [
        "# Model-privacy audit",
        "",
        f"Means over {drawn}; attackers train for up to {report.steps} steps on their own rows. Stolen value is (best "
        "attacker − local only) / (server − local only), with the 95 % bootstrap interval. Attackers choose their best "
        "on these very rows, which flatters them. docs/threat-model.md says what this means.",
        "",
        "What each party holds, or can make. Intervals are of the difference to the server's model, rows drawn for both together; "
        "`of the way` is (guessing − loss) / (guessing − server).",
        "",
        *format_table(tabulate_parties(report.list_parties())),
        "",
        *format_table(
            [
                ["reference", *measures],
                ["owner's model before", *(f"{report.before[measure]:.4f}" for measure in measures)],
                ["server's model after", *(f"{report.server[measure]:.4f}" for measure in measures)],
            ]
        ),
        "",
        f"What the base is worth, (base − guessing) / (owner's model before − guessing), in loss; the owner's model has "
        f"{report.exposure.server:.4f}, guessing {report.exposure.local_only:.4f}. {report.exposure.reason}".rstrip(),
        "",
        *format_table(_list_exposures(report)),
    ]
    lines += ["", *format_table(summarize_sent(report.sent))]
    for coalition in report.coalitions:
        lines += ["", *_render_coalition(coalition, measures)]
    lines += [f"\n**Note.** {note}" for note in report.notes]
    lines += ["", *report.data.render()] if report.data else []
    lines += ["", f"The audit took {report.seconds:.0f} s."]
    return "\n".join(lines) + "\n"


def _list_exposures(report: AuditReport) -> list[list[str]]:
    """The base as it is, and healed: the best that each coalition makes of it with its rows alone."""
    rows = [["base", "loss", "exposure"]]
    rows.append(["untouched", f"{report.exposure.attacker:.4f}", format_stolen(report.exposure)])
    for coalition in report.coalitions:
        count = len(coalition.clients)
        whose = "one client's rows" if count == 1 else f"the rows of {count} clients"
        label = f"healed on {whose}: {coalition.healed.best_attack}"
        rows.append([label, f"{coalition.healed.attacker:.4f}", format_stolen(coalition.healed)])
    return rows


def _render_coalition(coalition: CoalitionAudit, measures: list[str]) -> list[str]:
    names = ", ".join(coalition.clients)
    table = [["attacker", *measures]]
    for kind, found in (("", coalition.attacks), ("local only: ", coalition.local_only)):
        table += [[kind + name, *(f"{means[m]:.4f}" for m in measures)] for name, means in found.items()]
    lines = [f"## {names} ({coalition.num_proxies} proxies)", "", *format_table(table), ""]
    for measure, stolen in coalition.stolen.items():
        lines.append(
            f"- Stolen value in {measure}: **{format_stolen(stolen)}**. Best attacker: {stolen.best_attack} "
            f"({stolen.attacker:.4f}); best local-only: {stolen.best_local} ({stolen.local_only:.4f}). "
            f"{stolen.reason}".rstrip()
        )
        better = stolen.attacker < stolen.server if measure == "loss" else stolen.attacker > stolen.server
        if better:
            lines.append(f"- **The attacker's model is better than the server's** in {measure}.")
    return lines + [f"- Diverged, and not counted: {', '.join(coalition.diverged)}." for _ in coalition.diverged[:1]]
