# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a base is worth to its clients, as it is and trained on, against what it costs the server.

    python -m benchmarks.exposure_plane --quick                                  one task, one seed, up to 40 steps
    python -m benchmarks.exposure_plane --csv docs/exposure.csv                  rnnlg, three seeds
    python -m benchmarks.exposure_plane --tasks smollm2 --model out/smollm2 --seeds 0 --measures bare "client 40" "public 40"

Exposure is (guessing − model) / (guessing − owner's model) in loss on evaluation rows. Healed exposure is that of the base with an
adapter of rank 8 after 40 or 400 steps on public text, on one client's rows, on text sampled from the base itself (distillation
without a teacher to ask), or on both of these. The base named `random` has nothing of the
owner's: random weights at 4 bits. What it reaches is what training gives without any base. The server's gap is its loss above the
full-precision federation's, in the recommended setting: nothing is broadcast, and the owner chooses λ, the share of the variate (two
runs) and the round. It needs the shared data folder beside the checkout. Measurements that the CSV has already are not run again.
"""

import argparse
import re
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

from benchmarks import real_model
from benchmarks.convergence import SHARED, read_rows
from benchmarks.privacy_frontier import number, prepare_stories, read_lines, warm_up, write_lines
from fedlpp_hf import FederatedConfig, FederatedTrainer
from fedlpp_hf.audit.attacks import fine_tune, pool_rows
from fedlpp_hf.processes.measurement import measure_rows
from fedlpp_hf.server.best import find_published_round
from fedlpp_hf.tensors.adapters import load_adapter_
from fedlpp_hf.tensors.codebooks import FULL_PRECISION


CALIBRATED = {"calibration_rows": 48}
BASES: dict[str, dict[str, Any]] = {
    "4 bits": {"base_bits": 4},
    "3 bits": {"base_bits": 3},
    "2 bits": {"base_bits": 2},
    "4 bits, calibrated": {"base_bits": 4, **CALIBRATED},
    "3 bits, calibrated": {"base_bits": 3, **CALIBRATED},
    "2 bits, calibrated": {"base_bits": 2, **CALIBRATED},
    "random": {"base_bits": 4},
}
SAMPLES = 96  # rows that the base itself writes
MEASURES = (
    "bare", "public 40", "client 40", "sampled 40", "both 40", "public 400", "client 400", "both 400", "server"
)  # fmt: skip
RECOMMENDED: dict[str, Any] = {
    "broadcast": "never",
    "base_weights": [0.0, 0.25, 0.5, 0.75],
    "control_variate": 1.0,
    "control_variate_runs": 2,
    "adapter_bits": 4,
}
# Local steps of each client in a round; rounds; rows of a step; and the model's public text, a task's column.
TASKS: dict[str, dict[str, Any]] = {
    "rnnlg": {"max_steps": 10, "num_rounds": 4, "per_device_train_batch_size": 8, "public": ("e2e", "ref", 96)},
    "smollm2": {"max_steps": 4, "num_rounds": 3, "per_device_train_batch_size": 4, "public": ("rnnlg", "text", 96)},
}


class Task:
    """A task's rows and models, and the losses of the references."""

    def __init__(self, name: str, model: str, scratch: Path):
        self.name, self.scratch = name, scratch
        self.options = dict(TASKS[name])
        public = self.options.pop("public")
        if name == "rnnlg":
            self.data = prepare_stories(name)
            self.options |= self.data.pop("options")
            warm_up(self.data, scratch / name)
            self.full_model = self.data.pop("full_model")
        else:
            self.full_model = model
            self.data = prepare_smollm2(model)
            self.options |= {"partition": "client", "learning_rate": 5e-4}
        self.public = prepare_public(self.data["processing_class"], *public)

    def make_random(self) -> str:
        """A model of the owner's shape that knows nothing."""
        directory = self.scratch / f"{self.name}-random"
        set_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.full_model)).save_pretrained(directory)
        return str(directory)

    def make_trainer(self, model: str, seed: int, **options: Any) -> FederatedTrainer:
        selects = "base_weights" in options
        args = FederatedConfig(
            str(self.scratch / "run"), **self.options, **options, seed=seed, per_device_eval_batch_size=16,
            lr_scheduler_type="constant", adapter_block_size=64, merge=False, overwrite=True, report_to=[],
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        data = self.data if selects else self.data | {"selection_dataset": None}
        return FederatedTrainer(model, args, **data)

    def measure_owner(self, seed: int) -> dict[str, float]:
        """The owner's model, guessing, and the federation in full precision."""
        trainer = self.make_trainer(
            self.full_model, seed, base_bits=FULL_PRECISION, adapter_bits=FULL_PRECISION, broadcast="every_round"
        )
        found = measure_rows(trainer, self.data["eval_dataset"])
        trainer.train()
        records = trainer.server.store.records()
        return {
            "owner": float(found.loss.mean()),
            "guessing": float(np.log(found.num_outputs)),
            "full precision": records[-1]["metrics"]["server"]["eval_loss"],
        }


def prepare_smollm2(model: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    owner = real_model.prepare("validation", tokenizer)
    return {
        "train_dataset": real_model.prepare("train", tokenizer),
        "eval_dataset": real_model.prepare("test", tokenizer).take(48).remove_columns("client"),
        "owner_dataset": owner.take(200),
        "selection_dataset": owner.skip(200).take(32),
        "processing_class": tokenizer,
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "peft_config": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    }


def prepare_public(tokenizer: Any, task: str, column: str, length: int) -> Dataset:
    """Sentences of another task, the loss on all of their tokens."""

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        tokens = [*tokenizer(row[column])["input_ids"], tokenizer.eos_token_id][:length]
        return {"input_ids": tokens, "labels": tokens}

    rows = read_rows(f"{task}/train.jsonl", 4000).shuffle(seed=0)
    return rows.map(encode, remove_columns=rows.column_names)


def measure_base(task: Task, base: str, seed: int, wanted: list[str]) -> Any:
    """The `wanted` measurements of one base, as lines."""
    began = time.perf_counter()
    random = base == "random"
    trainer = task.make_trainer(task.make_random() if random else task.full_model, seed, **RECOMMENDED, **BASES[base])
    start = dict(trainer.guard.initial)
    rows: dict[str, Any] = {"client": max(trainer.client_datasets.values(), key=len), "public": task.public}
    for what in wanted:
        line: dict[str, Any] = {"task": task.name, "base": base, "seed": seed, "measure": what}
        if what == "server":
            trainer.train()
            records = trainer.server.store.records()
            published = find_published_round(trainer.args, records)
            line |= {"loss": records[published]["metrics"]["server"]["eval_loss"], "round": published}
            line |= {"λ": records[published].get("base_weight", 0.0)}
            line |= {"share of the variate": records[published].get("variate_weight", 0.0)}
        else:
            adapters = [start]
            if what != "bare":
                text, steps = what.split()
                if text in ("sampled", "both") and text not in rows:
                    rows["sampled"] = sample_rows(trainer, seed)
                    rows["both"] = pool_rows([rows["client"], rows["sampled"]])
                rate = trainer.args.learning_rate
                taken = (max(1, int(steps) // 2), int(steps))
                adapters += fine_tune(trainer, rows[text], start, taken, rate, seed).values()
            line["loss"] = min(measure_adapter(trainer, adapter) for adapter in adapters)
        line["s"] = round(time.perf_counter() - began)
        began = time.perf_counter()
        yield line
    trainer.owner.close()


def sample_rows(trainer: FederatedTrainer, seed: int) -> Dataset:
    """Text that the base writes by itself, the loss on all of its tokens: data-free distillation (arXiv 2305.17888) from itself."""
    load_adapter_(trainer.guard.parameters, dict(trainer.guard.initial))
    tokenizer, model = trainer.processing_class, trainer.model
    set_seed(seed)
    model.eval()
    start = torch.full((SAMPLES, 1), tokenizer.bos_token_id)
    with torch.no_grad():
        written = model.generate(
            input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=64
        )
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in written.tolist()])


def measure_adapter(trainer: Any, adapter: Mapping[str, Any]) -> float:
    load_adapter_(trainer.guard.parameters, adapter)
    return float(measure_rows(trainer, trainer.eval_dataset).loss.mean())


def summarize(lines: list[dict[str, str]]) -> dict[str, dict[str, dict[str, tuple[float, float, float]]]]:
    """By task, base and measure: the mean, least and largest exposure over seeds, or gap of the server."""
    found: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
    references = {(x["task"], x["seed"], x["measure"]): number(x, "loss") for x in lines if x["base"] == "reference"}
    for task in dict.fromkeys(line["task"] for line in lines):
        found[task] = {}
        for base in BASES:
            for what in MEASURES:
                values = []
                for line in lines:
                    if (line["task"], line["base"], line["measure"]) != (task, base, what):
                        continue
                    owner, guess, full = (
                        references[task, line["seed"], name] for name in ("owner", "guessing", "full precision")
                    )
                    loss = number(line, "loss")
                    values.append(loss / full - 1 if what == "server" else (guess - loss) / (guess - owner))
                if values:
                    entry = statistics.fmean(values), min(values), max(values)
                    found[task].setdefault(base, {})[what] = entry
    return found


def format_summary(found: dict[str, dict[str, dict[str, tuple[float, float, float]]]]) -> str:
    """The tables, a line for each base: means over seeds, and the range of the server's gap."""
    text = []
    for task, bases in found.items():
        text += ["", f"| {task}: base | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 1) + "|"]
        for base, entries in bases.items():
            cells = [base]
            for what in MEASURES:
                mean, low, high = entries.get(what, (float("nan"),) * 3)
                cell = "" if mean != mean else f"{mean:.0%}"
                if cell and what == "server":
                    cell = f"{low:+.1%}" if low == high else f"{low:+.1%} to {high:+.1%}"
                cells.append(cell)
            text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def draw(found: dict[str, dict[str, dict[str, tuple[float, float, float]]]], path: Path) -> None:
    """Healed exposure, 40 steps on a client's rows, against the server's gap; a point for each base."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task, bases in found.items() if any({"client 40", "server"} <= e.keys() for e in bases.values())]
    if not tasks:
        return
    figure = Figure(figsize=(4.8 * len(tasks), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for base, entries in found[task].items():
            if base == "random" and "client 40" in entries:
                axes.axvline(100 * entries["client 40"][0], color="#555555", linestyle=":", label="random weights")
            if not {"client 40", "server"} <= entries.keys():
                continue
            (x, left, right), (y, low, high) = entries["client 40"], entries["server"]
            bits = re.search(r"\d", base).group()
            axes.errorbar(
                100 * x, 100 * y, [[100 * (y - low)], [100 * (high - y)]], [[100 * (x - left)], [100 * (right - x)]],
                marker={"4": "o", "3": "s", "2": "^"}[bits], color="#0b6e4f" if "calibrated" in base else "#c8553d",
                linestyle="", capsize=2, label=base,
            )  # fmt: skip
        axes.axhspan(-100, 3, 0, 1, color="#0b6e4f", alpha=0.05)
        axes.axvline(50, color="#999999", linewidth=0.8)
        points = [100 * entries["server"][2] for entries in found[task].values() if "server" in entries]
        axes.set_ylim(min(-2, min(points) - 1), max(4, max(points) + 1))
        axes.set_xlim(0, 110)
        axes.set_xlabel("healed exposure after 40 steps on a client's rows, %")
        axes.set_ylabel("server's loss above full precision, %")
        axes.set_title(task, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rnnlg, seed 0, up to 40 steps")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["rnnlg"])
    parser.add_argument("--bases", nargs="+", choices=list(BASES), metavar="BASE", default=list(BASES))
    parser.add_argument("--measures", nargs="+", choices=MEASURES, metavar="MEASURE", default=list(MEASURES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="out/smollm2", help="directory of SmolLM2")
    parser.add_argument("--csv", type=Path, default=Path("out/exposure_plane/exposure.csv"))
    parser.add_argument("--scratch", type=Path, default=Path("out/exposure_plane"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tasks, arguments.seeds = ["rnnlg"], [0]
        arguments.measures = ["bare", "public 40", "client 40", "server"]
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")
    lines: list[dict[str, Any]] = list(read_lines(arguments.csv))

    def add(line: dict[str, Any]) -> None:
        print(", ".join(f"{key} {value}" for key, value in line.items()), flush=True)
        lines.append(line)
        write_lines(arguments.csv, lines)

    for name in arguments.tasks:
        task = Task(name, arguments.model, arguments.scratch)
        for seed in arguments.seeds:
            done = {
                (line["base"], line["measure"])
                for line in lines
                if (line["task"], str(line["seed"])) == (name, str(seed))
            }
            if ("reference", "owner") not in done:
                for measure, loss in task.measure_owner(seed).items():
                    add({"task": name, "base": "reference", "seed": seed, "measure": measure, "loss": loss})
            for base in arguments.bases:
                wanted = [what for what in MEASURES if what in arguments.measures and (base, what) not in done]
                wanted = [what for what in wanted if base != "random" or what != "server"]
                if wanted:
                    for line in measure_base(task, base, seed, wanted):
                        add(line)
    found = summarize(list(read_lines(arguments.csv)))
    print(format_summary(found))
    draw(found, arguments.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
