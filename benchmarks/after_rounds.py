# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What else the owner could choose once the rounds are over: weights of clients or layers, λ by layer, a polish on its own rows.

    python -m benchmarks.after_rounds --csv docs/after_rounds.csv

A federation of [`privacy_frontier`] in which nothing is broadcast and the owner chooses λ, then each choice in turn, by coordinate
search on the same selection rows. "polish" trains the server's model on the owner's 400 rows for as long as the selection rows
gain by it; "owner alone" does the same from the owner's model. Losses are those of the 256 evaluation rows, which nothing is
chosen by. It needs the shared data folder beside the checkout. Lines that the CSV file has already are not run again.
"""

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from benchmarks.convergence import SHARED
from benchmarks.privacy_frontier import (
    ENCODER,
    SETTINGS,
    STORIES,
    prepare_encoder,
    prepare_stories,
    read_lines,
    warm_up,
    write_lines,
)
from fedlpp_hf import FederatedConfig, FederatedTrainer
from fedlpp_hf.processes.between import moved_towards_base, open_base
from fedlpp_hf.tensors.adapters import adapter_parameters, copy_adapter, load_adapter_


SETTING = "nothing in 12 rounds, 4 bits, λ alone"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # λ
SCALES = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
PASSES = 2  # of a coordinate search
CHECKS, EVERY, RATE = 8, 5, 2e-4  # of a polish: at most CHECKS × EVERY steps of 8 rows

Adapter = Mapping[str, torch.Tensor]


class Bench:
    """W with an adapter, in one process: losses on the selection and the evaluation rows."""

    def __init__(self, data: Mapping[str, Any], base_dir: Path, scratch: Path):
        model = data["model_class"].from_pretrained(data["full_model"])
        self.model = get_peft_model(model, data["peft_config"])
        self.parameters = adapter_parameters(self.model)
        self.base = open_base(self.model, str(base_dir))
        args = TrainingArguments(
            str(scratch), per_device_eval_batch_size=64, report_to="none", use_cpu=True, disable_tqdm=True
        )
        self.data, self.trainer = data, Trainer(self.model, args, data_collator=data["data_collator"])
        self.layers = sorted({find_layer(key) for key in self.parameters})

    def measure(self, adapter: Adapter, rows: str, weight: float | Mapping[str, float] = 0.0) -> float:
        """The loss of W − λE + θ on `selection_dataset` or `eval_dataset`; λ is one number, or one for each layer."""
        load_adapter_(self.parameters, adapter)
        if isinstance(weight, float):
            with moved_towards_base(self.model, self.base, weight):
                return float(self.trainer.evaluate(self.data[rows])["eval_loss"])
        kept = []
        for name, parameter in self.model.get_base_model().named_parameters():
            plain = name.replace(".base_layer", "")
            moved = weight.get(find_layer(name), 0.0)
            if moved and ".lora_" not in name and self.base.is_quantized(plain):
                kept.append((parameter, parameter.data))
                parameter.data = parameter.data.lerp(self.base.read(plain), moved)
        loss = float(self.trainer.evaluate(self.data[rows])["eval_loss"])
        for parameter, own in kept:
            parameter.data = own
        return loss

    def polish(self, adapter: Adapter, weight: float) -> tuple[float, int]:
        """The evaluation loss after as many steps on the owner's rows as the selection rows gain by, and that number."""
        load_adapter_(self.parameters, adapter)
        set_seed(0)
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=RATE)
        unused = [name for name in ("domain",) if name in self.data["owner_dataset"].column_names]
        rows = self.data["owner_dataset"].remove_columns(unused)
        loader = iter(DataLoader(rows, 8, shuffle=True, collate_fn=self.data["data_collator"]))
        best = (self.measure(adapter, "selection_dataset", weight), 0, copy_adapter(self.parameters))
        for check in range(CHECKS):
            with moved_towards_base(self.model, self.base, weight):
                self.model.train()
                for _ in range(EVERY):
                    self.model(**next(loader)).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            now = copy_adapter(self.parameters)
            loss = self.measure(now, "selection_dataset", weight)
            best = min(best, (loss, (check + 1) * EVERY, now), key=lambda entry: entry[0])
        return self.measure(best[2], "eval_dataset", weight), best[1]


def find_layer(key: str) -> str:
    """The layer that a parameter is of, or "" for what is in none."""
    found = re.search(r"\.(?:layers?|h)\.(\d+)\.", key)
    return f"{int(found.group(1)):02d}" if found else ""


def search(start: Sequence[float], values: Sequence[float], loss: Callable[[Sequence[float]], float]) -> list[float]:
    """The least `loss` that changing one coordinate after the other finds."""
    best, least = list(start), loss(start)
    for _ in range(PASSES):
        before = list(best)
        for place in range(len(best)):
            for value in values:
                candidate = [*best[:place], value, *best[place + 1 :]]
                if candidate != best and (found := loss(candidate)) < least:
                    best, least = candidate, found
        if best == before:
            break
    return best


def run(task: str, seed: int, data: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One federation and all choices after it, as a line of the table."""
    began = time.perf_counter()
    given = {name: value for name, value in data.items() if name not in ("full_model", "options")}
    args = FederatedConfig(
        str(scratch / f"{task}-{seed}"), **SETTINGS[SETTING], **data["options"], seed=seed, per_device_train_batch_size=8,
        per_device_eval_batch_size=64, lr_scheduler_type="constant", adapter_block_size=64, merge=False, overwrite=True,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = FederatedTrainer(data["full_model"], args, **given)
    trainer.train()
    trainer.owner.close()
    state, start = trainer.server.state, dict(trainer.guard.initial)
    bench = Bench(data, Path(args.output_dir) / "_federation" / "base", scratch / "bench")
    # Their own adapters after the last round, which no server has: an upper bound of what weighting them could gain.
    folders = sorted(Path(args.output_dir).glob("_clients/*"))
    clients = [load_file(sorted(folder.glob("round-*.safetensors"))[-1]) for folder in folders]
    line: dict[str, Any] = {"task": task, "seed": seed}

    def mix(scales: Sequence[float]) -> dict[str, torch.Tensor]:
        return {
            key: value + sum(s * (own[key] - value) for s, own in zip(scales, clients, strict=True)) / len(clients)
            for key, value in start.items()
        }

    def stretch(scales: Sequence[float]) -> dict[str, torch.Tensor]:
        by_layer = dict(zip(bench.layers, scales, strict=True))
        return {
            key: start[key] + by_layer[find_layer(key)] * (value - start[key]) for key, value in state.adapter.items()
        }

    def measure(adapter: Adapter, weight: float | Mapping[str, float]) -> float:
        return bench.measure(adapter, "eval_dataset", weight)

    weight = state.base_weight
    line |= {"before": measure(start, 0.0), "server": measure(state.adapter, weight), "λ": weight}
    ones = [1.0] * len(clients)
    last = min(WEIGHTS, key=lambda w: bench.measure(mix(ones), "selection_dataset", w))
    line["last round, mean"] = measure(mix(ones), last)
    scales = search(ones, SCALES, lambda s: bench.measure(mix(s), "selection_dataset", last))
    line |= {"clients weighted": measure(mix(scales), last), "weights": " ".join(map(str, scales))}
    ones = [1.0] * len(bench.layers)
    scales = search(ones, SCALES, lambda s: bench.measure(stretch(s), "selection_dataset", weight))
    line |= {"layers weighted": measure(stretch(scales), weight)}

    def weigh(values: Sequence[float]) -> dict[str, float]:
        return dict(zip(bench.layers, values, strict=True))

    values = search(
        [weight] * len(bench.layers),
        WEIGHTS,
        lambda v: bench.measure(state.adapter, "selection_dataset", weigh(v)),
    )
    line |= {"λ by layer": measure(state.adapter, weigh(values)), "values": " ".join(map(str, values))}
    line["polished"], line["polish steps"] = bench.polish(state.adapter, weight)
    line["owner alone"], line["owner steps"] = bench.polish(start, 0.0)
    line = {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
    return line | {"s": round(time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=[*STORIES, *ENCODER], default=[*ENCODER, *STORIES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--csv", type=Path, default=Path("out/after_rounds/after_rounds.csv"))
    parser.add_argument("--scratch", type=Path, default=Path("out/after_rounds"))
    arguments = parser.parse_args()
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")
    lines: list[dict[str, Any]] = list(read_lines(arguments.csv))
    done = {(line["task"], str(line["seed"])) for line in lines}
    for task in arguments.tasks:
        wanted = [seed for seed in arguments.seeds if (task, str(seed)) not in done]
        if not wanted:
            continue
        data = prepare_stories(task) if task in STORIES else prepare_encoder(task)
        warm_up(data, arguments.scratch / task)
        for seed in wanted:
            lines.append(run(task, seed, data, arguments.scratch))
            print(", ".join(f"{key} {value}" for key, value in lines[-1].items()), flush=True)
            write_lines(arguments.csv, lines)


if __name__ == "__main__":
    main()
