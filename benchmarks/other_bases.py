# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What else clients could hold in place of Q(W): a model with layers or columns left out, or a public relative.

    python -m benchmarks.other_bases --csv docs/other_bases.csv

The owner's model W is stories260K tuned for a while on rows that no client has, as in [`privacy_frontier`]. Each base goes through
the same rounds, and its updates into the same W:

- Q(W) in 4 and 3 bits;
- every second layer left out, the others in 8 bits, as an emulator of offsite tuning (arXiv 2302.04870) has them: both outputs of a
  left-out layer are zero, so that it passes on what it gets;
- a fifth of the columns of each linear layer set to zero, drawn once, the rest in 8 bits, as in FedQSN's first proxy;
- the public model that W was tuned from, in 4 bits: nothing of the owner's tuning leaves at all.

Exposure, healed exposure and stolen value are from the audit of the run in which proxies are sent. It needs the shared data folder
beside the checkout. Lines that the CSV file has already are not run again.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.convergence import SHARED
from benchmarks.privacy_frontier import SETTINGS, STORIES, prepare_stories, read_lines, warm_up, write_lines
from fedlpp_hf import AuditReport, FederatedConfig, FederatedTrainer, export_base
from fedlpp_hf.server.best import find_published_round


RUNS = {  # name → setting of the frontier
    "every round": "every round, 4 bits",
    "every round, variate": "every round, 4 bits, four variates",
    "nothing, λ": "nothing in 12 rounds, 4 bits, λ alone",
    "nothing, variate and λ": "nothing in 12 rounds, 4 bits, chosen",
}
SHARE = 0.2  # of the columns


def drop_layers_(model: Any) -> None:
    """Make every second layer pass on what it gets."""
    for layer in model.model.layers[1::2]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()


def mask_columns_(model: Any) -> None:
    """Set a share of each linear layer's columns to zero."""
    generator = torch.Generator().manual_seed(0)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            dropped = torch.rand(module.in_features, generator=generator) < SHARE
            module.weight.data[:, dropped] = 0


# Name → what is done to W (None: the public model instead), bits.
BASES: dict[str, tuple[Callable[[Any], None] | None, int]] = {
    "Q(W), 4 bits": (lambda model: None, 4),
    "Q(W), 3 bits": (lambda model: None, 3),
    "every second layer": (drop_layers_, 8),
    "four fifths of the columns": (mask_columns_, 8),
    "public relative": (None, 4),
}


def make_base(name: str, full_model: str, scratch: Path) -> Path:
    """The directory of a base."""
    change, bits = BASES[name]
    source = Path(full_model)
    if change is None:
        source = SHARED / "models" / "stories260K"
    else:
        model = AutoModelForCausalLM.from_pretrained(full_model)
        change(model)
        source = scratch / "changed"
        model.save_pretrained(source)
    export_base(source, scratch / "base", bits=bits, embedding_bits=bits, overwrite=True)
    return scratch / "base"


def run(task: str, base: str, name: str, seed: int, data: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One federation, as a line of the table."""
    began = time.perf_counter()
    setting = {key: value for key, value in SETTINGS[RUNS[name]].items() if key != "base_bits"}
    given = {key: value for key, value in data.items() if key not in ("full_model", "options")}
    if "base_weights" not in setting:
        given["selection_dataset"] = None
    args = FederatedConfig(
        str(scratch / "run"), **setting, **data["options"], full_model=data["full_model"], seed=seed,
        per_device_train_batch_size=8, per_device_eval_batch_size=64, lr_scheduler_type="constant", adapter_block_size=64,
        audit=name == "every round", audit_steps=40, merge=False, overwrite=True, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = FederatedTrainer(str(make_base(base, data["full_model"], scratch)), args, **given)
    trainer.train()
    records = trainer.server.store.records()
    published = find_published_round(args, records)
    trainer.owner.close()
    line: dict[str, Any] = {"task": task, "base": base, "run": name, "seed": seed}
    line["owner before"] = records[0]["metrics"]["server"]["eval_loss"]
    line["base alone"] = records[0]["metrics"]["proxy"]["eval_loss"]
    line["server"] = records[published]["metrics"]["server"]["eval_loss"]
    line |= {"round": published, "λ": records[published].get("base_weight", 0.0)}
    line["share of the variate"] = records[published].get("variate_weight", 0.0)
    if args.audit:
        report = AuditReport.read(args.output_dir)
        line |= {"exposure": report.exposure.value, "healed": report.worst_single.healed.value}
        line["stolen"] = report.worst_single.stolen["loss"].value
    line = {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
    return line | {"s": round(time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(STORIES), default=["rnnlg"])
    parser.add_argument("--bases", nargs="+", choices=list(BASES), metavar="BASE", default=list(BASES))
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), metavar="RUN", default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--csv", type=Path, default=Path("out/other_bases/other_bases.csv"))
    parser.add_argument("--scratch", type=Path, default=Path("out/other_bases"))
    arguments = parser.parse_args()
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")
    lines: list[dict[str, Any]] = list(read_lines(arguments.csv))
    done = {(line["task"], line["base"], line["run"], str(line["seed"])) for line in lines}
    for task in arguments.tasks:
        cases = [(b, n, s) for s in arguments.seeds for n in arguments.runs for b in arguments.bases]
        wanted = [case for case in cases if (task, case[0], case[1], str(case[2])) not in done]
        if not wanted:
            continue
        data = prepare_stories(task)
        warm_up(data, arguments.scratch / task)
        for base, name, seed in wanted:
            lines.append(run(task, base, name, seed, data, arguments.scratch))
            print(", ".join(f"{key} {value}" for key, value in lines[-1].items()), flush=True)
            write_lines(arguments.csv, lines)


if __name__ == "__main__":
    main()
