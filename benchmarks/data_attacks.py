# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What one client's update tells of its rows: inversion by spans and by optimization, and what each defence leaves of it.

    python -m benchmarks.data_attacks --csv docs/data_attacks.csv        all that the file has not yet, then the tables
    python -m benchmarks.data_attacks --quick                            the undefended case of both models, one seed

stories260K on sentences of rnnlg (16 tokens at most, every token a label), and MiniLM on questions of TREC; LoRA on all Linears, real
local runs through the Trainer. The base is not quantized, which makes the search by optimization ten times as fast on a CPU; the
attacker has the base, whatever its bits (`--base_bits 4`). The attacker is the server. Each case differs in one thing from the undefended one: one
step of SGD, rank 32, two rows (MiniLM: one row), the first round. ROUGE is on token ids, in percent, without the tokens that begin and
end every row. `control` is the same attack on noise as long as the update: what the attacker's knowledge of language is worth. Needs
the shared data folder, and for the noise at ε 8 the extra `privacy`.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    set_seed,
)

from benchmarks.convergence import SHARED, read_rows
from benchmarks.encoder import find_encoder
from benchmarks.privacy_frontier import read_lines, write_lines
from fedlpp_hf import FederatedConfig, FederatedTrainer, export_base
from fedlpp_hf.audit.inversion import invert_update
from fedlpp_hf.audit.observed import ObservedUpdate
from fedlpp_hf.audit.recovery import score_recovery, score_tokens
from fedlpp_hf.audit.sequences import InversionLimits
from fedlpp_hf.privacy.clipping import clip_update
from fedlpp_hf.report.tables import format_table
from fedlpp_hf.tensors.adapters import global_norm
from fedlpp_hf.tensors.codebooks import FULL_PRECISION
from fedlpp_hf.wire.compression import decompress_update
from fedlpp_hf.wire.messages import ClientTask, LocalOptions


LONGEST = 16  # tokens of a row of stories260K
QUANTIZATION_ERROR = 0.1  # of NormalFloat codes of 4 bits, relative
MOST_ROWS = 8  # that the attacker tries to find; of more, the others count as not found
EPSILON, DELTA = 8.0, 1e-5


@dataclass(frozen=True)
class Case:
    """One setting. `changes` are options of the trainer, `local` those of the task."""

    rank: int = 32
    rows: int = 2
    steps: int = 1
    later: bool = False  # a round after the first, B ≠ 0
    clients: int = 1  # whose sum the attacker sees
    noise: bool = False
    clip: float = 0.0
    update_bits: int = 32
    dropout: float = 0.0
    changes: Mapping[str, Any] = field(default_factory=lambda: {"optim": "sgd", "learning_rate": 0.1})


ADAM: dict[str, Any] = {"optim": "adamw_torch_fused", "learning_rate": 1e-3}
STORIES: dict[str, Case] = {
    "undefended": Case(),
    "rank 4": Case(rank=4),
    "rank 8": Case(rank=8),
    "rank 16": Case(rank=16),
    "rank 64": Case(rank=64),
    "rank 8, one row": Case(rank=8, rows=1),
    "a later round": Case(later=True),
    "a later round, rank 4": Case(rank=4, later=True),
    "a later round, rank 8": Case(rank=8, later=True),
    "a later round, rank 16": Case(rank=16, later=True),
    "one step of AdamW": Case(changes=ADAM),
    "one step of AdamW, one row": Case(rows=1, changes=ADAM),
    "one step of AdamW, a later round": Case(later=True, changes=ADAM),
    "4 steps": Case(steps=4, rows=1),
    "10 steps": Case(steps=10, rows=1),
    "4 steps, a later round": Case(steps=4, rows=1, later=True),
    "4 steps of AdamW": Case(steps=4, rows=1, changes=ADAM),
    "10 steps of AdamW": Case(steps=10, rows=1, changes=ADAM),
    "4 rows": Case(rows=4),
    "8 rows": Case(rows=8),
    "updates of 4 bits": Case(update_bits=4),
    "clip to a tenth": Case(clip=0.1),
    "noise at ε 8": Case(noise=True),
    "sum of 4 clients": Case(clients=4),
    "sum of 4 clients, a later round": Case(clients=4, later=True),
    "sum of 10 clients": Case(clients=10),
}
ENCODER: dict[str, Case] = {
    "undefended": Case(rows=1),
    "rank 4": Case(rank=4, rows=1),
    "rank 8": Case(rank=8, rows=1),
    "rank 16": Case(rank=16, rows=1),
    "rank 64": Case(rank=64, rows=1),
    "a later round, rank 8": Case(rank=8, rows=1, later=True),
    "one step of AdamW": Case(rows=1, changes=ADAM),
    "4 steps": Case(rows=1, steps=4),
    "10 steps of AdamW": Case(rows=1, steps=10, changes=ADAM),
    "2 rows, rank 64": Case(rank=64, rows=2),
    "8 rows, rank 64": Case(rank=64, rows=8),
    "updates of 4 bits": Case(rows=1, update_bits=4),
    "clip to a tenth": Case(rows=1, clip=0.1),
    "noise at ε 8": Case(rows=1, noise=True),
    "sum of 4 clients": Case(rows=1, clients=4),
    "the model's own dropout, 0.1": Case(rows=1, dropout=0.1),
}
CASES = {"stories260K": STORIES, "MiniLM": ENCODER}


def prepare_stories() -> dict[str, Any]:
    source = SHARED / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = read_rows("rnnlg/train.jsonl").shuffle(seed=0).take(600)
    ids = [found[:LONGEST] for found in tokenizer(list(rows["text"]))["input_ids"]]
    return {
        "full": lambda dropout: AutoModelForCausalLM.from_pretrained(source),
        "tokenizer": tokenizer,
        "rows": Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(x) for x in ids]}),
        "collator": DataCollatorForSeq2Seq(tokenizer),
        "model_class": AutoModelForCausalLM,
        "task_type": "CAUSAL_LM",
        "begin": tokenizer.bos_token_id,
        "end": None,
        "ignored": {tokenizer.bos_token_id},
    }


def prepare_encoder() -> dict[str, Any]:
    source = find_encoder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = read_rows("trec/train.jsonl").shuffle(seed=0).take(600)

    def load(dropout: float):
        set_seed(0)
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        return AutoModelForSequenceClassification.from_pretrained(source, num_labels=6, **rates)

    return {
        "full": load,
        "tokenizer": tokenizer,
        "rows": rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=40)).remove_columns("text"),
        "collator": DataCollatorWithPadding(tokenizer),
        "model_class": AutoModelForSequenceClassification,
        "task_type": "SEQ_CLS",
        "begin": tokenizer.cls_token_id,
        "end": tokenizer.sep_token_id,
        "ignored": {tokenizer.cls_token_id, tokenizer.sep_token_id},
    }


def find_noise_multiplier(epsilon: float = EPSILON, delta: float = DELTA) -> float:
    """z of the Gaussian mechanism of one round in which every client takes part."""
    from dp_accounting import calibrate_dp_mechanism, dp_event, pld

    return float(calibrate_dp_mechanism(pld.PLDAccountant, dp_event.GaussianDpEvent, epsilon, delta))


def make_trainer(data: Mapping[str, Any], case: Case, seed: int, scratch: Path) -> Any:
    model: Any = data["full"](case.dropout)
    if data["base_bits"] < FULL_PRECISION:
        full, model = scratch / f"full-{case.dropout}", str(scratch / f"base-{case.dropout}")
        if not Path(model).is_dir():
            data["full"](case.dropout).save_pretrained(full)
            export_base(full, model, bits=data["base_bits"], model_class=data["model_class"])
    args = FederatedConfig(
        str(scratch / "out"), seed=seed, num_rounds=1, per_device_train_batch_size=case.rows, max_steps=case.steps,
        base_bits=data["base_bits"], lr_scheduler_type="constant", merge=False, overwrite=True, report_to=[], use_cpu=True, disable_tqdm=True, **case.changes,
    )  # fmt: skip
    lora = LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear", task_type=data["task_type"])
    return FederatedTrainer(
        model, args, train_dataset={"one": data["rows"]}, processing_class=data["tokenizer"], peft_config=lora,
        data_collator=data["collator"], model_class=data["model_class"],
    )  # fmt: skip


def train(trainer: Any, rows: Dataset, start: Mapping[str, torch.Tensor], seed: int, case: Case, who: int = 0):
    """Δ of a client's run on `rows`, as the server decodes it."""
    options = LocalOptions(update_bits=case.update_bits)
    task = ClientTask(f"attack-{seed}", 1, 1, f"client-{who}", seed, trainer.guard.fingerprint, start, options)
    return decompress_update(trainer.train_client(task, rows).delta, start)


def observe(
    data: Mapping[str, Any], case: Case, seed: int, scratch: Path
) -> tuple[Any, ObservedUpdate, list[list[int]]]:
    """The trainer, what the attacker sees of the clients' runs, and their rows."""
    trainer = make_trainer(data, case, seed, scratch)
    rows, count = data["rows"], case.rows * case.steps
    start = dict(trainer.guard.initial)
    if case.later:  # the adapter has been trained on rows that nobody attacks
        before = {
            name: getattr(trainer.args, name) for name in ("max_steps", "learning_rate", "per_device_train_batch_size")
        }
        vars(trainer.args).update(max_steps=10, learning_rate=1e-3 if "adam" in case.changes["optim"] else 0.1)
        moved = train(trainer, rows.select(range(500, 600)), start, seed, Case())
        start = {key: value + moved[key] for key, value in start.items()}
        vars(trainer.args).update(before)
    first = 60 * seed % 400
    parts = [rows.select(range(first + n * count, first + (n + 1) * count)) for n in range(case.clients)]
    deltas = [train(trainer, part, start, seed, case, who) for who, part in enumerate(parts)]
    if case.clip:
        deltas = [clip_update(delta, case.clip * global_norm(delta))[0] for delta in deltas]
    delta = {key: torch.stack([other[key] for other in deltas]).sum(0) for key in deltas[0]}
    noise = 0.0
    if case.noise:  # of the sum, as one sees it who knows all clients but this one; the clip cuts nothing off
        noise = find_noise_multiplier() * global_norm(delta)
        generator = torch.Generator().manual_seed(seed)
        delta = {key: value + noise * torch.randn(value.shape, generator=generator) for key, value in delta.items()}
    adam = (
        case.changes["learning_rate"]
        if "adam" in case.changes["optim"] and case.steps == 1 and not case.clip
        else None
    )
    error = QUANTIZATION_ERROR if case.update_bits < 32 else 0.0
    return (
        trainer,
        ObservedUpdate(delta, start, noise, error, adam),
        [row for part in parts for row in part["input_ids"]],
    )


def attack(
    data: Mapping[str, Any], name: str, case: Case, seed: int, scratch: Path, evaluations: int
) -> list[dict[str, Any]]:
    """The figures of the attack, and of the same on noise."""
    trainer, update, rows = observe(data, case, seed, scratch)
    limits = InversionLimits(
        min(len(rows), MOST_ROWS), max(map(len, rows)), data["begin"], data["end"], evaluations=evaluations
    )
    length, generator = global_norm(update.delta), torch.Generator().manual_seed(seed)
    random = {key: torch.randn(value.shape, generator=generator) for key, value in update.delta.items()}
    scale = length / global_norm(random)
    control = ObservedUpdate({key: scale * value for key, value in random.items()}, update.start, noise=scale)
    found = []
    for what, seen in (("update", update), ("control", control)):
        if what == "control" and name != "undefended":
            continue
        began = time.perf_counter()
        inversion = invert_update(trainer.model, seen, trainer.guard.peft_config, limits)
        scores = score_recovery(rows, inversion.rows, data["ignored"])
        tokens = score_tokens(rows, {token for place in inversion.tokens for token in place}, data["ignored"])
        found.append(
            {
                "case": name if what == "update" else "control: noise as long", "seed": seed, "evaluations": evaluations, "rows": len(rows),
                "tokens_in": len({token for row in rows for token in row}), "by": " + ".join(inversion.by),
                "tokens": round(tokens, 1), "rouge_1": round(scores.rouge_1, 1), "rouge_2": round(scores.rouge_2, 1),
                "rouge_l": round(scores.rouge_l, 1), "exact": round(scores.exact, 1),
                "match": "" if inversion.match is None else round(inversion.match, 3),
                "seconds": round(time.perf_counter() - began, 1),
            }
        )  # fmt: skip
    return found


def summarize(lines: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["model"], line["case"]].append(line)
    text = []
    for model in CASES:
        table = [
            [
                "case",
                "seeds",
                "rows",
                "different tokens",
                "tokens found (F)",
                "ROUGE-1",
                "ROUGE-2",
                "ROUGE-L",
                "exact rows",
            ]
        ]
        for (name, case), found in groups.items():
            if name == model:
                means = [
                    statistics.fmean(float(line[key]) for line in found)
                    for key in ("tokens_in", "tokens", "rouge_1", "rouge_2", "rouge_l", "exact")
                ]
                table.append([case, str(len(found)), str(found[0]["rows"]), f"{means[0]:.0f}", *(f"{m:.0f}" for m in means[1:-1]),
                              f"{means[-1]:.0f} %"])  # fmt: skip
        if len(table) > 1:
            text += [f"### {model}", "", *format_table(table), ""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--quick", action="store_true", help="the undefended cases of one seed")
    parser.add_argument("--evaluations", type=int, default=600, help="gradients that the search by optimization takes")
    parser.add_argument("--base_bits", type=int, default=FULL_PRECISION, help="of the clients' base")
    parser.add_argument("--csv", type=Path, default=Path("out/data_attacks/data_attacks.csv"))
    arguments = parser.parse_args()
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")
    lines: list[dict[str, Any]] = [] if arguments.quick else list(read_lines(arguments.csv))
    done = {(line["model"], line["case"], str(line["seed"])) for line in lines}
    for seed in arguments.seeds[:1] if arguments.quick else arguments.seeds:
        for model in arguments.models:
            data = prepare_stories() if model == "stories260K" else prepare_encoder()
            data["base_bits"] = arguments.base_bits
            with tempfile.TemporaryDirectory() as scratch:
                for name, case in CASES[model].items():
                    if (model, name, str(seed)) in done or (arguments.quick and name != "undefended"):
                        continue
                    for line in attack(data, name, case, seed, Path(scratch), arguments.evaluations):
                        lines.append({"model": model, **line})
                        print(lines[-1], flush=True)
                    if not arguments.quick:
                        write_lines(arguments.csv, lines)
    print(summarize(lines))


if __name__ == "__main__":
    main()
