# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Simulate presets on the owner's own rows before any partner is asked: one federation and one audit for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig, TaskType
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

from ..audit.report import AuditReport
from ..audit.stolen_value import StolenValue
from ..config.arguments import parse_args
from ..config.federated import FederatedConfig
from ..config.presets import FIXED, Preset, divide_steps, make_flags
from ..report.advice import Estimate, PresetResult, Recommendation
from ..server.store import RoundStore
from .advice_results import SCHEMA_VERSION, describe_model, open_output, read_result, write_advice, write_result
from .advice_rows import CLIENT_GROUP, AdviceRows, RowSource, prepare_rows
from .callbacks import FederatedCallback
from .federated import FederatedTrainer


# What a simulation on a laptop starts from; any flag overrides it.
DEFAULTS: dict[str, Any] = {
    "num_clients": 4,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "seed": 0,
}


@dataclass(frozen=True, slots=True)
class Simulation:
    """What all presets share.

    Args:
        full_model: The owner's full model: a directory or a Hub id.
        rows: Clients' rows, and those that no client has.
        flags: Options of [`FederatedConfig`], as flags, that all presets share.
        steps: Local steps of each client in all rounds, and of each attacker.
        lora: Options of `LoraConfig`.
        output_dir: Of all results.
    """

    full_model: str
    rows: AdviceRows
    flags: Sequence[str]
    steps: int
    lora: Mapping[str, Any]
    output_dir: Path

    @classmethod
    def prepare(
        cls,
        full_model: str,
        source: RowSource,
        flags: Sequence[str],
        steps: int,
        lora: Mapping[str, Any],
        output_dir: Path,
    ) -> "Simulation":
        """A simulation of the owner's rows, which are read, encoded and split.

        Args:
            full_model: A directory or a Hub id.
            source: Of the rows.
            flags: Options that all presets share, as flags.
            steps: Local steps of each client in all rounds.
            lora: Options of `LoraConfig`.
            output_dir: Of all results.

        Raises:
            ValueError: for wrong flags, and as [`prepare_rows`].
        """
        args = parse_args((FederatedConfig,), [*make_flags(DEFAULTS), *flags, "--output_dir", str(output_dir)])[0]
        group = {"iid": None, "dirichlet": args.dirichlet_column}.get(args.partition, args.partition)
        rows = prepare_rows(source, full_model, group, args.num_clients or 1, args.seed)
        if group is not None:
            option = "dirichlet_column" if args.partition == "dirichlet" else "partition"
            flags = [*flags, f"--{option}", CLIENT_GROUP]
        return cls(full_model, rows, flags, steps, lora, output_dir)

    def make_args(self, preset: Preset) -> FederatedConfig:
        """The options of a preset's federation.

        Raises:
            ValueError: for options that do not go together, naming the preset.
        """
        own: dict[str, Any] = {"output_dir": str(self.output_dir / preset.name), "audit_steps": self.steps}
        own |= {"audit_rows": len(self.rows.parts["test"])}
        try:
            if not {"max_steps", "num_train_epochs"} & set(preset.options):
                own["max_steps"] = divide_steps(preset.options, self.steps)
            flags = [*make_flags(DEFAULTS), *self.flags, *make_flags({**preset.options, **own, **FIXED})]
            return parse_args((FederatedConfig,), flags)[0]
        except ValueError as error:
            raise ValueError(f"The preset `{preset.name}`: {error}") from error

    def list_facts(self) -> list[str]:
        """Sentences on what is simulated."""
        counts = {name: len(rows) for name, rows in self.rows.parts.items()}
        facts = [
            f"{counts['clients']} of the owner's rows ({self.rows.kind}) are split into pseudo-clients, with {self.steps} local steps "
            f"each; {counts['test']} are for this table, {counts['selection']} choose, {counts['owner']} are the owner's."
        ]
        if self.rows.dropped:
            facts.append(f"{self.rows.dropped} rows were dropped: max_length cuts off all that is to be learned.")
        return facts

    def describe(self) -> dict[str, Any]:
        """What a simulation must have in common with the one that it goes on with."""
        return {
            "schema": SCHEMA_VERSION,
            "full_model": describe_model(self.full_model),
            "rows": self.rows.digest,
            "flags": list(self.flags),
            "steps": self.steps,
            "lora": dict(self.lora),
        }


class _Progress(FederatedCallback):
    """Moves the bar of all presets."""

    def __init__(self, bar: Any, name: str):
        self.bar, self.name = bar, name

    def __getstate__(self) -> dict[str, Any]:
        """Without the bar: the copies in `client_workers` hear of no round."""
        return {"bar": None, "name": self.name}

    def on_round_begin(self, args, state, control, *, round_number, client_ids, **kwargs):
        self.bar.set_description(f"{self.name}, round {round_number} of {args.num_rounds}")

    def on_client_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_federation_end(self, args, state, control, **kwargs):
        self.bar.set_description(f"{self.name}, audit")


def simulate(
    simulation: Simulation, presets: Sequence[Preset], max_stolen: float, show: bool = True
) -> tuple[list[PresetResult], Recommendation]:
    """Run each preset that has no result yet, write `advice.md`, `advice.json` and `advice.png`, and recommend one.

    A preset that fails costs its own result alone, and is tried again the next time.

    Args:
        simulation: What all presets share.
        presets: To compare.
        max_stolen: Largest stolen value that the owner accepts.
        show: Whether to show a progress bar.

    Raises:
        ValueError: for options that do not go together, before anything is trained.
    """
    options = [simulation.make_args(preset) for preset in presets]
    settings = simulation.describe()
    open_output(simulation.output_dir, settings)
    known = [read_result(simulation.output_dir / preset.name, preset) for preset in presets]
    results: list[PresetResult] = []
    clients = [args.num_rounds * count_clients(simulation, args) + 1 for args in options]  # and the audit
    with tqdm(total=sum(clients), unit="run", disable=not show, delay=0.1) as bar:
        for preset, args, count, result in zip(presets, options, clients, known, strict=True):
            bar.set_description(preset.name)
            began = bar.n
            try:
                results.append(result or _run_preset(simulation, preset, args, bar))
            except (ValueError, RuntimeError, OSError) as error:
                failure = f"Failed: {' '.join(str(error).split())}"
                results.append(PresetResult(preset.name, preset.summary, preset.options, failure=failure))
            bar.update(began + count - bar.n)
            recommendation = write_advice(
                simulation.output_dir, settings, simulation.list_facts(), results, max_stolen
            )
    return results, recommendation


def count_clients(simulation: Simulation, args: FederatedConfig) -> int:
    """Clients of a round."""
    rows = simulation.rows.parts["clients"]
    total = len(set(rows[args.partition])) if args.partition in rows.column_names else args.num_clients or 1
    return min(args.clients_per_round or total, total)


def _run_preset(simulation: Simulation, preset: Preset, args: FederatedConfig, bar: Any) -> PresetResult:
    parts, classifies = simulation.rows.parts, simulation.rows.kind == "classification"
    tokenizer = AutoTokenizer.from_pretrained(simulation.full_model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collator = DataCollatorWithPadding(tokenizer) if classifies else DataCollatorForSeq2Seq(tokenizer)
    trainer = FederatedTrainer(
        simulation.full_model,
        args,
        collator,
        parts["clients"],
        parts["test"],
        peft_config=LoraConfig(
            task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM, **dict(simulation.lora)
        ),
        owner_dataset=parts["owner"],
        selection_dataset=parts["selection"] if preset.selects else None,
        model_class=AutoModelForSequenceClassification if classifies else AutoModelForCausalLM,
        callbacks=[_Progress(bar, preset.name)],
        processing_class=tokenizer,
    )
    try:
        trainer.train(resume_from_checkpoint=RoundStore(args.output_dir).latest() is not None)
        result = _measure(trainer, preset)
    finally:
        trainer.owner.close()
    write_result(Path(args.output_dir), result)
    return result


def _measure(trainer: FederatedTrainer, preset: Preset) -> PresetResult:
    server: Any = trainer.server
    audit = AuditReport.read(trainer.args.output_dir)
    before = trainer.owner.measure_rows(server.store.load(0)[0])
    after = trainer.owner.measure_rows(server.state.adapter, server.state.residual, server.state.base_weight)
    clients = len(server.num_examples)
    records = server.store.records()
    stolen = [coalition.stolen["loss"] for coalition in audit.coalitions]
    healed = [coalition.healed for coalition in audit.coalitions]
    accuracy = [float(np.mean(m.accuracy)) for m in (before, after) if m.accuracy is not None]
    return PresetResult(
        preset.name,
        preset.summary,
        {name: list(value) if isinstance(value, tuple) else value for name, value in preset.options.items()},
        before=before.loss.tolist(),
        after=after.loss.tolist(),
        accuracy=accuracy,
        stolen=_largest(stolen),
        exposure=_largest([audit.exposure]),
        healed=_largest(healed),
        base_bytes=sum(entry.bytes for entry in audit.sent if entry.part == "base"),
        down=sum(record["bytes_down"] for record in records) // clients,
        up=sum(record["bytes_up"] for record in records) // clients,
        seconds=audit.seconds + sum(record["seconds"] for record in records),
    )


def _largest(values: Sequence[StolenValue]) -> Estimate:
    """The value with the largest upper bound; none, if one of them could not be determined."""
    if not values or any(value.high is None for value in values):
        return Estimate(None, None, None)
    found = max(values, key=lambda value: value.high or 0.0)
    return Estimate(found.value, found.low, found.high)
