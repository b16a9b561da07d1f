# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Server quality against stolen value: bits of the base, what is broadcast, and the control variate, on real tasks.

    python -m benchmarks.privacy_frontier --quick                                        one task, one seed
    python -m benchmarks.privacy_frontier --settings quick --csv docs/frontier.csv       four tasks, three seeds
    python -m benchmarks.privacy_frontier --tasks rnnlg --csv docs/frontier.csv          all settings

It needs the shared data folder beside the checkout, and makes each task's owner's model itself: stories260K (rnnlg, e2e)
or MiniLM (trec, sst2), all weights tuned for a while on rows that no client has. The owner keeps 400 of them for the
server's step and the control variate. Four clients: domains, kinds of food, or Dirichlet 0.5 over labels. Every setting but
one has the same number of local steps. Losses are means over at most 256 evaluation rows that nothing was chosen by, except that attackers
choose their best on them. Lines that the CSV file has already are not run again; from it come the table and the picture.
"""

import argparse
import csv
import re
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.convergence import SHARED, compute_accuracy, read_rows
from benchmarks.encoder import find_encoder
from fedlpp_hf import AuditReport, FederatedConfig, FederatedTrainer
from fedlpp_hf.server.best import find_published_round
from fedlpp_hf.tensors.codebooks import FULL_PRECISION


STEPS, ROUNDS = 40, 4  # of each client, 8 rows each: 4 × 10, or one run of 40 where nothing is broadcast
EVERY: dict[str, Any] = {"num_rounds": ROUNDS, "max_steps": STEPS // ROUNDS, "adapter_bits": 4}
NEVER: dict[str, Any] = {"num_rounds": 1, "max_steps": STEPS, "broadcast": "never"}
# Up to three times the steps. The owner takes the round that its selection rows say, the untouched model included.
ROUND_BY_ROUND: dict[str, Any] = {"num_rounds": 3 * ROUNDS, "max_steps": STEPS // ROUNDS, "broadcast": "never"}
CHOSEN = {"base_weights": [0.0, 0.25, 0.5, 0.75]}
EXACT = {**CHOSEN, "aggregation": "exact", "update_scales": [1.0, 0.5, 0.75, 1.25, 1.5]}
UP_TO_2 = {**EXACT, "update_scales": [*EXACT["update_scales"], 2.0]}
VARIATE = {"control_variate": 1.0}
FOUR = {**VARIATE, "control_variate_runs": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "every round, 4 bits": {**EVERY, "base_bits": 4},
    "every round, 4 bits, one variate": {**EVERY, **VARIATE, "base_bits": 4},
    "every round, 4 bits, four variates": {**EVERY, **FOUR, "base_bits": 4},
    "every round, 4 bits, proxies of 2 bits": {**EVERY, "base_bits": 4, "adapter_bits": 2},
    "every round, 3 bits": {**EVERY, "base_bits": 3},
    "every round, 3 bits, one variate": {**EVERY, **VARIATE, "base_bits": 3},
    "every round, 3 bits, four variates": {**EVERY, **FOUR, "base_bits": 3},
    "nothing, full precision": {**NEVER, "base_bits": FULL_PRECISION, "adapter_bits": FULL_PRECISION},
    "nothing, 4 bits, four variates": {**NEVER, **FOUR, "base_bits": 4},
    "nothing, 4 bits, four variates, 120 steps": {**NEVER, **FOUR, "base_bits": 4, "max_steps": 3 * STEPS},
    "nothing, 3 bits, four variates": {**NEVER, **FOUR, "base_bits": 3},
    "nothing, 2 bits, four variates": {**NEVER, **FOUR, "base_bits": 2},
    "nothing in 4 rounds, 4 bits, chosen": {**EVERY, **FOUR, **CHOSEN, "broadcast": "never", "base_bits": 4},
    "nothing in 4 rounds, 4 bits, exact, chosen": {**EVERY, **EXACT, "broadcast": "never", "base_bits": 4},
    "nothing in 4 rounds, 4 bits, λ alone": {**EVERY, **CHOSEN, "broadcast": "never", "base_bits": 4},
    "nothing in 4 rounds, 4 bits, λ and scale": {
        **EVERY, **EXACT, "aggregation": "fedavg", "broadcast": "never", "base_bits": 4,
    },
    "nothing in 4 rounds, 4 bits, exact, λ alone": {
        **EVERY, **EXACT, "update_scales": [1.0], "broadcast": "never", "base_bits": 4,
    },
    "nothing in 4 rounds, 4 bits, exact, chosen up to 2": {**EVERY, **UP_TO_2, "broadcast": "never", "base_bits": 4},
    "nothing in 4 rounds, 4 bits, exact, four variates, chosen": {
        **EVERY, **EXACT, **FOUR, "broadcast": "never", "base_bits": 4,
    },
    "nothing in 4 rounds, 3 bits, exact, chosen": {**EVERY, **EXACT, "broadcast": "never", "base_bits": 3},
    "nothing in 12 rounds, 4 bits, chosen": {**ROUND_BY_ROUND, **FOUR, **CHOSEN, "base_bits": 4},
    "nothing in 12 rounds, 3 bits, chosen": {**ROUND_BY_ROUND, **FOUR, **CHOSEN, "base_bits": 3},
    "nothing in 12 rounds, full precision": {
        **ROUND_BY_ROUND, "base_bits": FULL_PRECISION, "adapter_bits": FULL_PRECISION,
    },
    "nothing in 12 rounds, 4 bits, λ alone": {**ROUND_BY_ROUND, **CHOSEN, "base_bits": 4},
    "nothing in 12 rounds, 4 bits, λ alone, adjusted logits": {
        **ROUND_BY_ROUND, **CHOSEN, "base_bits": 4, "logit_adjustment": 1.0,
    },
    "every round of 12, full precision": {
        **EVERY, "num_rounds": 3 * ROUNDS, "base_bits": FULL_PRECISION, "adapter_bits": FULL_PRECISION,
    },
    "every round of 12, full precision, adjusted logits": {
        **EVERY, "num_rounds": 3 * ROUNDS, "base_bits": FULL_PRECISION, "adapter_bits": FULL_PRECISION, "logit_adjustment": 1.0,
    },
}  # fmt: skip
LONG_REFERENCE = "every round of 12, full precision"
LONG = {name for name, setting in SETTINGS.items() if setting["num_rounds"] * setting["max_steps"] == 3 * STEPS}
QUICK = (
    "every round, 4 bits",
    "every round, 4 bits, four variates",
    "nothing, 4 bits, four variates",
    "nothing, 3 bits, four variates",
)
# The columns of prompt and completion, and the tokens that a row is cut to. E2E's prompts are longer, and longest in its
# validation and test splits: at 96 tokens little of their completions would be left.
STORIES = {"rnnlg": ("act", "text", 96), "e2e": ("mr", "ref", 224)}
ENCODER = {"trec": 6, "sst2": 2}  # the number of classes


def prepare_stories(task: str) -> dict[str, Any]:
    """Rows and arguments of a causal language model's task; the loss is on the completion."""
    source = SHARED / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompt, completion, length = STORIES[task]

    def encode(row):
        start = tokenizer(row[prompt] + "\n")["input_ids"]
        end = [*tokenizer(row[completion], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": (start + end)[:length], "labels": ([-100] * len(start) + end)[:length]}

    def prepare(split: str, count: int | None = None) -> Dataset:
        rows = read_rows(f"{task}/{split}.jsonl").shuffle(seed=0)
        if task == "e2e":  # four kinds of food are the clients
            foods = [re.search(r"food\[(\w+)", text) for text in rows["mr"]]
            rows = rows.add_column("domain", [food.group(1) if food else "" for food in foods])
            rows = rows.filter(lambda row: row["domain"] in ("English", "Italian", "French", "Japanese"))
        rows = rows if count is None else rows.take(count)
        unused = [name for name in rows.column_names if name != "domain"]
        return rows.map(encode, remove_columns=unused).filter(lambda row: any(x != -100 for x in row["labels"]))

    return {
        "model": AutoModelForCausalLM.from_pretrained(source),
        "warm_up": (prepare("validation", 2000), 100, 2e-3),
        "selection_dataset": prepare("test", 400).skip(256).take(100),
        "train_dataset": prepare("train"),
        "eval_dataset": prepare("test", 256),
        "processing_class": tokenizer,
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "model_class": AutoModelForCausalLM,
        "peft_config": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        "options": {"partition": "domain", "learning_rate": 1e-3},
    }


def prepare_encoder(task: str) -> dict[str, Any]:
    """Rows and arguments of a classifier's task."""
    source = find_encoder()
    tokenizer = AutoTokenizer.from_pretrained(source)

    def tokenize(rows: Dataset) -> Dataset:
        return rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=40)).remove_columns("text")

    rows = tokenize(read_rows(f"{task}/train.jsonl").shuffle(seed=0))
    others = tokenize(read_rows(f"{task}/test.jsonl").shuffle(seed=0))
    set_seed(0)
    return {
        "model": AutoModelForSequenceClassification.from_pretrained(source, num_labels=ENCODER[task]),
        "warm_up": (rows.take(400), 50, 2e-4),
        "train_dataset": rows.skip(400),
        "eval_dataset": others.take(256),
        "selection_dataset": others.skip(256).take(100),
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": compute_accuracy,
        "model_class": AutoModelForSequenceClassification,
        "peft_config": LoraConfig(
            r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"], task_type="SEQ_CLS"
        ),
        "options": {"partition": "dirichlet", "num_clients": 4, "learning_rate": 1e-3},
    }


def warm_up(data: dict[str, Any], directory: Path) -> None:
    """Tune the owner's model, all weights, and save it; then `data` has its rows as the owner's dataset."""
    rows, steps, rate = data.pop("warm_up")
    model = data.pop("model")
    args = TrainingArguments(
        str(directory / "trainer"), max_steps=steps, learning_rate=rate, per_device_train_batch_size=16,
        lr_scheduler_type="cosine", save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    unused = [name for name in ("domain",) if name in rows.column_names]
    Trainer(model, args, train_dataset=rows.remove_columns(unused), data_collator=data["data_collator"]).train()
    model.save_pretrained(directory / "full")
    data["full_model"] = str(directory / "full")
    data["owner_dataset"] = rows.take(400)


def run_setting(
    task: str, name: str, seed: int, data: dict[str, Any], references: bool, scratch: Path, audit: bool = True
) -> dict[str, Any]:
    """One federation with its audit, as a line of the table."""
    began = time.perf_counter()
    data = dict(data)
    setting = dict(SETTINGS[name])
    if "base_weights" not in setting:  # as it was measured before there was a choice
        data["selection_dataset"] = None
    args = FederatedConfig(
        str(scratch / f"{task}-{seed}"),
        **setting,
        **data.pop("options"),
        seed=seed,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=64,
        lr_scheduler_type="constant",
        adapter_block_size=64,
        compare_full_precision=references,
        audit=audit,
        audit_rows=256,
        audit_steps=setting["num_rounds"] * setting["max_steps"],
        merge=False,
        overwrite=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = FederatedTrainer(data.pop("full_model"), args, **data)
    args.compare_full_precision = False  # asked for below, where its result is at hand
    trainer.train()
    records = trainer.server.store.records()
    published = find_published_round(args, records)
    first, last = (records[place]["metrics"] for place in (0, published))
    line = {"task": task, "setting": name, "seed": seed}
    if "base_weights" in setting:
        line |= {"round": published, "λ": records[published].get("base_weight", 0.0)}
        line["scale"] = records[published].get("update_scale", 1.0)
        line["share of the variate"] = records[published].get("variate_weight", 0.0)
        line["chosen"] = " ".join(
            f"{record['selection_loss']:.4f}/{record.get('base_weight', 0):g}/{record.get('variate_weight', 0):g}"
            f"/{record.get('update_scale', 1):g}"
            for record in records
        )
    found = {"owner before": first["server"], "base": first["proxy"], "server": last["server"]}
    if references:
        found["full precision"] = trainer.owner.run_reference()
        found["owner alone"] = trainer.owner.run_reference(own_rows=True)
    trainer.owner.close()
    for label, metrics in found.items():
        line |= {f"{label}: {key.removeprefix('eval_')}": round(value, 4) for key, value in metrics.items()}
    if not audit:
        return line | {"s": round(time.perf_counter() - began)}
    report = AuditReport.read(args.output_dir)
    for label, coalition in (("client", report.worst_single), ("half", report.worst_half)):
        if coalition is not None:
            stolen = coalition.stolen["loss"]
            line |= {f"{label}: attacker": stolen.attacker, f"{label}: alone": stolen.local_only}
            line |= {f"{label}: stolen": stolen.value, f"{label}: low": stolen.low, f"{label}: high": stolen.high}
    return line | {"exposure": report.exposure.value, "s": round(time.perf_counter() - began)}


def read_lines(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def summarize(lines: list[dict[str, str]]) -> str:
    """The table: means over seeds, and the ranges over them of the stolen value and of the server's loss above full precision.

    Full precision is the same seed's federation of as many steps; losses of one task are comparable.
    """
    text = []
    for task in dict.fromkeys(line["task"] for line in lines):
        mine = [line for line in lines if line["task"] == task]
        text += [
            f"\n{task}: owner's model before {describe(mine, 'owner before')}, federation in full precision "
            f"{describe(mine, 'full precision')}, owner's own rows alone {describe(mine, 'owner alone')}\n",
            "| broadcast, base | seeds | server | above full precision | base | best client | alone | stolen | best half | alone "
            "| stolen | exposure |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        groups = defaultdict(list)
        for line in mine:
            groups[line["setting"]].append(line)
        for name in SETTINGS:
            if group := groups.get(name):
                full, audited = find_reference(mine, name), [line for line in group if line.get("exposure")]
                above = [
                    number(line, "server: loss") / full[line["seed"]] - 1 for line in group if line["seed"] in full
                ]
                cells = [
                    name,
                    str(len(group)),
                    describe(group, "server"),
                    format_range(above, 1) if above else "",
                    f"{mean_of(group, 'base: loss'):.3f}",
                ]
                for label in ("client", "half"):
                    if not audited:
                        cells += [""] * 3
                        continue
                    cells += [f"{mean_of(audited, f'{label}: {what}'):.3f}" for what in ("attacker", "alone")]
                    cells.append(format_range([number(line, f"{label}: stolen") for line in audited]))
                cells.append(f"{mean_of(audited, 'exposure'):.0%}" if audited else "")
                text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def describe(lines: list[dict[str, str]], name: str) -> str:
    """The mean loss of a model over the lines that have it, and its accuracy."""
    lines = [line for line in lines if line.get(f"{name}: loss")]
    text = f"{mean_of(lines, f'{name}: loss'):.3f}"
    if lines and lines[0].get(f"{name}: accuracy"):
        text += f" ({mean_of(lines, f'{name}: accuracy'):.1%})"
    return text


def find_reference(lines: list[dict[str, str]], setting: str) -> dict[str, float]:
    """The loss of the federation in full precision that had as many steps, by seed."""
    if setting in LONG:
        long = [line for line in lines if line["setting"] == LONG_REFERENCE]
        return losses_by_seed(long, "server")
    return losses_by_seed(lines, "full precision")


def losses_by_seed(lines: list[dict[str, str]], name: str) -> dict[str, float]:
    """A reference's loss, which one line of each seed has."""
    return {line["seed"]: number(line, f"{name}: loss") for line in lines if line.get(f"{name}: loss")}


def mean_of(lines: list[dict[str, str]], name: str) -> float:
    return statistics.fmean(number(line, name) for line in lines) if lines else float("nan")


def number(line: dict[str, str], name: str) -> float:
    return float(line.get(name) or "nan")  # there is no stolen value where the server is no better than local training


def format_range(values: list[float], digits: int = 0) -> str:
    known = [value for value in values if value == value]
    if not known:
        return "no gain"
    low, high = (f"{value:.{digits}%}" for value in (min(known), max(known)))
    text = low if low == high else f"{low} to {high}"
    return text if len(known) == len(values) else f"{text}; no gain in {len(values) - len(known)} of {len(values)}"


def draw(lines: list[dict[str, str]], path: Path) -> None:
    """Server's loss above full precision against the stolen value of half of the clients, a point a setting and seed.

    Where nothing is sent, nothing is stolen: those settings stand side by side around 0. Where the server has no gain over what clients
    have alone, or they have more than the server, the point stands at the right.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(max(4.2 * len(tasks), 6), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        mine = [line for line in lines if line["task"] == task]
        short = losses_by_seed(mine, "full precision")
        alone = losses_by_seed(mine, "owner alone")
        quiet = [name for name in SETTINGS if name.startswith("nothing") and any(x["setting"] == name for x in mine)]
        beside = {name: 6.0 * (place - (len(quiet) - 1) / 2) for place, name in enumerate(quiet)}
        for name in SETTINGS:
            full = find_reference(mine, name)
            group = [line for line in mine if line["setting"] == name and line["seed"] in full]
            if name in beside:  # zero by construction, so it is known without an audit
                stolen = [beside[name]] * len(group)
            else:
                group = [line for line in group if line.get("exposure")]
                stolen = [100 * number(line, "half: stolen") for line in group]
            if not group:
                continue
            kinds = [marker for kind, marker in (("proxies", "P"), ("up to 2", "*"), ("exact", "X")) if kind in name]
            bits, fill = re.search(r"\d(?= bits)|full", name).group(), "none"
            if "variate" in name or "chosen" in name:
                fill = "#0b6e4f" if "four" in name and "chosen" not in name else "#9ccdb5"
            if "exact" in name:
                fill = "#e0a030"
            axes.scatter(
                [value if value <= 100 else 120 for value in stolen],
                [100 * (number(line, "server: loss") / full[line["seed"]] - 1) for line in group],
                marker=kinds[0] if kinds else {"4": "o", "3": "s", "2": "^", "full": "D"}[bits],
                s=100 if name in LONG or "exact" in name else 36,  # three times the steps, or products
                facecolors=fill,
                edgecolors="#c8553d" if name.startswith("every") else "#0b6e4f",
                label=name,
            )
        axes.axhline(0, linestyle="--", color="#555555", linewidth=1)
        for seed, loss in alone.items():
            axes.axhline(100 * (loss / short[seed] - 1), linestyle=":", color="#555555", linewidth=1)
        axes.margins(y=0.08)
        axes.set_yscale("symlog", linthresh=3)
        ticks = [
            tick for tick in (-10, -5, -2, 0, 1, 2, 5, 10, 20, 50) if axes.get_ylim()[0] < tick < axes.get_ylim()[1]
        ]
        axes.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.set_xlim(-50, 130)
        axes.set_xticks([-40, 0, 40, 80, 120], ["-40", "0", "40", "80", "all, or\nno gain"])
        axes.set_title(f"{task} (dotted: the owner's rows alone)", fontsize=9)
        axes.set_xlabel("stolen value of half of the clients, %")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("server's loss above full precision, %")
    known = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rnnlg, seed 0, the four quick settings")
    parser.add_argument("--tasks", nargs="+", choices=[*STORIES, *ENCODER], default=[*STORIES, *ENCODER])
    parser.add_argument(
        "--settings", nargs="+", metavar="SETTING", choices=[*SETTINGS, "quick"], default=list(SETTINGS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--without_audit", action="store_true", help="only the server, as where nothing is sent")
    parser.add_argument("--csv", type=Path, default=Path("out/privacy_frontier/frontier.csv"))
    parser.add_argument("--scratch", type=Path, default=Path("out/privacy_frontier"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tasks, arguments.seeds, arguments.settings = ["rnnlg"], [0], ["quick"]
    if arguments.settings == ["quick"]:
        arguments.settings = list(QUICK)
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")

    lines: list[dict[str, Any]] = list(read_lines(arguments.csv))
    done = {(line["task"], line["setting"], str(line["seed"])) for line in lines}
    for task in arguments.tasks:
        wanted = [(seed, name) for seed in arguments.seeds for name in arguments.settings]
        wanted = [(seed, name) for seed, name in wanted if (task, name, str(seed)) not in done]
        if not wanted:
            continue
        data = prepare_stories(task) if task in STORIES else prepare_encoder(task)
        warm_up(data, arguments.scratch / task)
        for seed, name in wanted:
            references = name == next(iter(SETTINGS))
            lines.append(
                run_setting(
                    task, name, seed, data, references, arguments.scratch / "runs", not arguments.without_audit
                )
            )
            print(
                ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in lines[-1].items()),
                flush=True,
            )
            write_lines(arguments.csv, lines)
    lines = list(read_lines(arguments.csv))
    print(summarize(lines))
    draw(lines, arguments.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
