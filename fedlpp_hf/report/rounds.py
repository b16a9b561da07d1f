# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Rounds as they come: a progress bar, a line for each, trackers, and at the end the report's files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from ..config.federated import FederatedConfig
from ..config.metrics import MetricChoice
from ..server.store import RoundStore
from .metrics import Record, flatten_record
from .page import PageContent, render_page
from .picture import draw_rounds
from .sent import SentTensor
from .text import AuditSummary, describe_round, render_report


REPORT_PAGE = "report.html"


class RoundReporter:
    """Shows a federation's rounds as they come, and hands them to the trackers of `report_to`."""

    def __init__(self, args: FederatedConfig, trackers: CallbackHandler):
        self.args = args
        self.trackers = trackers
        self.output_dir = Path(args.output_dir)
        self.choice = MetricChoice.of(args)
        self.state, self.control = TrainerState(is_world_process_zero=True), TrainerControl()
        self._text, self._drawn = "", False
        self._bar = tqdm(total=args.num_rounds, unit="round", disable=args.disable_tqdm, leave=False, delay=0.1)

    def __enter__(self) -> "RoundReporter":
        self.trackers.on_train_begin(self.args, self.state, self.control)
        return self

    def __exit__(self, *exception: object) -> None:
        self.trackers.on_train_end(self.args, self.state, self.control)
        self._bar.close()

    def on_client(self, client_id: str) -> None:
        self._bar.set_postfix_str(f"{client_id} done")

    def on_round(self, record: Record) -> None:
        number = record["round"]
        self._bar.n = number
        self._bar.refresh()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with open(self.output_dir / "metrics.jsonl", "a" if number else "w", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.state.global_step = number
        self.trackers.on_log(self.args, self.state, self.control, logs=flatten_record(record))
        if not self.args.disable_tqdm:
            tqdm.write(describe_round(record, self.args.num_rounds, self.choice))

    def write(
        self,
        records: Sequence[Record],
        references: Mapping[str, Mapping[str, float]] | None = None,
        audit: AuditSummary | None = None,
        sent: Sequence[SentTensor] = (),
    ) -> None:
        """Write `report.md`, `report.html`, `metrics.jsonl` and `rounds.png`, in place of those that are there.

        Args:
            records: Of all rounds, from round 0.
            references: Metrics of models that nobody holds, by label.
            audit: What the audit found, if there was one.
            sent: The tensors of the base and of a proxy, for the page.
        """
        attackers = audit.attackers if audit else []
        self._text = render_report(records, self.args, references, attackers)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.output_dir / "metrics.jsonl").write_text(lines, encoding="utf-8")
        (self.output_dir / "report.md").write_text(self._text, encoding="utf-8")
        store = RoundStore(self.output_dir)
        federation = store.read() if store.exists else {}
        content = PageContent(
            records,
            self.args,
            references or {},
            audit,
            sent,
            federation_id=federation.get("federation_id", ""),
            base_fingerprint=federation.get("base_fingerprint", ""),
        )
        (self.output_dir / REPORT_PAGE).write_text(render_page(content), encoding="utf-8")
        self._drawn = draw_rounds(records, self.output_dir / "rounds.png", references, self.choice, attackers)

    def show(self) -> None:
        """Print the report that was written last, unless progress bars are off."""
        if self.args.disable_tqdm or not self._text:
            return
        self._bar.clear()
        tqdm.write(f"\n{self._text}")
        if not self._drawn:
            tqdm.write("No rounds.png, and no pictures in report.html: they need matplotlib (pip install matplotlib).")
