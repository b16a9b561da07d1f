# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What was tried against stolen value and bent updates beside the frontier's settings, and what each is worth.

    python -m benchmarks.defences --seeds 0 1 2 --csv docs/defences.csv

On one task of the frontier (`--task`, rnnlg by default), its owner's model and its clients. All of it but the first table's
last two lines is one long round in which nothing is broadcast, so that all variants of the owner's estimate can be compared
on the same clients' updates: the loss of the server's model W + θ on evaluation rows, the lower the better. Beside it, the
loss of the base that clients hold. Lines that the CSV file has already are not run again. Needs the shared data folder.
"""

import argparse
import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer

from benchmarks.convergence import SHARED
from benchmarks.privacy_frontier import STEPS, STORIES, prepare_stories, read_lines, warm_up, write_lines
from fedlpp_hf import FederatedConfig, FederatedTrainer, export_base
from fedlpp_hf.aggregation.mean import average_updates
from fedlpp_hf.aggregation.round import RoundUpdates
from fedlpp_hf.aggregation.rules import aggregate
from fedlpp_hf.aggregation.variate import average_variates
from fedlpp_hf.processes.owner import OwnerProcess
from fedlpp_hf.tensors.adapters import global_norm
from fedlpp_hf.tensors.codebooks import codebook, nf4_subset
from fedlpp_hf.tensors.lora import lora_factors
from fedlpp_hf.tensors.quantization import restore_from_levels, round_to_levels
from fedlpp_hf.wire.encoding import restore_tensors
from fedlpp_hf.wire.messages import ClientTask


Adapter = dict[str, torch.Tensor]
Lines = Iterator[tuple[str, float]]
BLOCK = 64
RUNS = 4
# Bits of the linear layers whose names have one of these parts; 4 elsewhere. About 3 bits in the mean, but for the last.
MIXED = {
    "2 bits in the MLP, 4 in attention": (2, ("mlp.",)),
    "2 bits in attention, 4 in the MLP": (2, ("self_attn.",)),
    "2 bits in layers 1, 2, 3 of 5, 4 in the outer ones": (2, ("layers.1.", "layers.2.", "layers.3.")),
    "3 bits in the MLP, 4 in attention": (3, ("mlp.",)),
}


def make_trainer(data: Mapping[str, Any], directory: Path, seed: int, base: Path | None = None, **options: Any):
    args = FederatedConfig(
        str(directory), seed=seed, full_model=data["full_model"], per_device_train_batch_size=8,
        per_device_eval_batch_size=64, lr_scheduler_type="constant", adapter_block_size=BLOCK, merge=False, overwrite=True,
        report_to=[], use_cpu=True, disable_tqdm=True, **data["options"], **options,
    )  # fmt: skip
    arguments = {key: value for key, value in data.items() if key not in ("full_model", "options")}
    return FederatedTrainer(str(base or data["full_model"]), args, **arguments)


def loss_of(metrics: Mapping[str, float]) -> float:
    return metrics["eval_loss"]


def move(start: Adapter, delta: Adapter, variate: Adapter | None = None, coefficient: float = 1.0) -> Adapter:
    """θ₀ + Δ̄ − coefficient · variate."""
    return {
        key: value + delta[key] - (coefficient * variate[key] if variate is not None else 0.0)
        for key, value in start.items()
    }


def coarsen(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Q(W) of a linear layer, as the base's export rounds it."""
    levels = codebook(4)[list(nf4_subset(bits))]
    return restore_from_levels(*round_to_levels(weight, levels, BLOCK), levels, BLOCK).view(weight.shape)


@torch.no_grad()
def relabel(rows: Dataset, data: Mapping[str, Any]) -> Dataset:
    """The owner's rows with completions that its own model makes of their prompts: what it has without labels."""
    model = AutoModelForCausalLM.from_pretrained(data["full_model"]).eval()
    torch.manual_seed(0)
    found = []
    for row in rows:
        length = sum(label == -100 for label in row["labels"])
        prompt = torch.tensor([row["input_ids"][:length]])
        end = data["processing_class"].eos_token_id
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_length=96, do_sample=True, top_k=0, pad_token_id=end
        )[0].tolist()
        found.append({"input_ids": tokens, "labels": [-100] * length + tokens[length:]})
    return Dataset.from_list(found)


def try_estimates(
    data: Mapping[str, Any], other_rows: Mapping[str, Dataset], bits: int, seed: int, scratch: Path
) -> Lines:
    """The owner's estimate of the control variate, from what rows, of how many runs, and with what coefficient."""
    trainer = make_trainer(
        data, scratch / "estimates", seed, base_bits=bits, num_rounds=1, max_steps=STEPS, broadcast="never"
    )
    trainer.train()
    start, _ = trainer.server.store.load(0)
    delta = {key: value - start[key] for key, value in trainer.server.adapter.items()}

    def evaluate(adapter: Adapter) -> float:
        return loss_of(trainer.owner.evaluate(adapter))

    yield "the base, which clients hold", loss_of(trainer.server.store.records()[0]["metrics"]["proxy"])
    yield "no variate", evaluate(move(start, delta))
    for rows in ("the owner's rows", *other_rows):
        dataset = other_rows.get(rows, data["owner_dataset"])
        owner = OwnerProcess(dataclasses.replace(trainer.blueprint, owner_dataset=dataset))
        estimates = [owner.estimate_variate(start, 1, [seed * RUNS + run])[0] for run in range(RUNS)]
        owner.close()
        for runs in (1, RUNS):
            for coefficient in (0.5, 1.0):
                name = f"variate of {rows}, {runs} run{'s' * (runs > 1)}, coefficient {coefficient}"
                yield name, evaluate(move(start, delta, average_updates(estimates[:runs], [1.0] * runs), coefficient))
        mean, share = average_variates(estimates)
        yield f"variate of {rows}, {RUNS} runs: share that is not chance (no loss)", share
        yield (
            f"variate of {rows}, {RUNS} runs, coefficient by that share",
            evaluate(move(start, delta, mean, share)),
        )
    yield from try_error_aware_merge(data, trainer, delta, start, bits)
    trainer.owner.close()


@torch.no_grad()
def try_error_aware_merge(data: Mapping[str, Any], trainer: Any, delta: Adapter, start: Adapter, bits: int) -> Lines:
    """The owner knows E = W − Q(W): is the control variate the part of ΔW along it? Layer by layer it is taken out of W + ΔW."""
    model = AutoModelForCausalLM.from_pretrained(data["full_model"])
    adapter = move(start, delta)
    inner, updates, errors = 0.0, 0.0, 0.0
    for target in lora_factors(adapter, trainer.server.peft_config).values():
        weight = model.get_submodule(target.module).weight
        update = target.scale * adapter[target.key_b] @ adapter[target.key_a]
        error = weight - coarsen(weight, bits)
        along = float((update * error).sum() / error.square().sum())
        inner += float((update * error).sum())
        updates, errors = updates + float(update.square().sum()), errors + float(error.square().sum())
        weight += update - along * error
    yield "cosine of ΔW and E (no loss)", inner / (updates * errors) ** 0.5
    rows = trainer.eval_dataset.remove_columns([n for n in ("domain",) if n in trainer.eval_dataset.column_names])
    plain = Trainer(model, trainer.args, data_collator=data["data_collator"], eval_dataset=rows)
    yield "merge without ΔW's part along E", loss_of(plain.evaluate())


def try_compensation(data: Mapping[str, Any], bits: int, seed: int, scratch: Path) -> Lines:
    """An adapter that makes up for a part of E goes out with the base and is taken off at the merge (LoftQ's init)."""
    trainer = make_trainer(
        data, scratch / "compensation", seed, base_bits=bits, num_rounds=1, max_steps=STEPS, broadcast="never"
    )
    full = AutoModelForCausalLM.from_pretrained(data["full_model"])
    initial = dict(trainer.guard.initial)
    sent, kept, errors = dict(initial), 0.0, 0.0
    targets = lora_factors(initial, trainer.model.peft_config["default"])
    for target in targets.values():
        weight = full.get_submodule(target.module).weight.detach()
        u, s, vh = torch.linalg.svd(weight - coarsen(weight, bits), full_matrices=False)
        rank = len(initial[target.key_a])
        sent[target.key_b] = u[:, :rank] * s[:rank].sqrt() / target.scale
        sent[target.key_a] = s[:rank].sqrt()[:, None] * vh[:rank]
        kept, errors = kept + float(s[:rank].square().sum()), errors + float(s.square().sum())
    yield "share of ‖E‖² that rank 8 holds (no loss)", kept / errors
    yield "base + compensation, which clients hold", loss_of(trainer.evaluate_proxy(sent))
    updates = []
    for number, client in enumerate(trainer.client_datasets):
        task = ClientTask("defences", 1, 1, client, 100 * seed + number, trainer.guard.fingerprint, proxy=sent)
        updates.append(restore_tensors(trainer.train_client(task).delta))
    # The product moves by the mean step of the clients from what they were sent, which so never gets into the server's.
    weights = [len(rows) for rows in trainer.client_datasets.values()]
    result = aggregate("exact", RoundUpdates(updates, weights, sent, initial, trainer.model.peft_config["default"]))
    adapter = {key: value + result.delta.get(key, 0.0) for key, value in initial.items()}
    yield "server, compensation taken off", loss_of(trainer.owner.evaluate(adapter, result.residual))
    trainer.owner.close()


def try_mixed_bits(data: Mapping[str, Any], name: str, seed: int, scratch: Path) -> Lines:
    """A base whose layers differ in bits: coarse ones are rounded to fewer of NF4's levels before the export at 4 bits."""
    bits, parts = MIXED[name]
    model = AutoModelForCausalLM.from_pretrained(data["full_model"])
    count = coarse = 0
    with torch.no_grad():
        for module, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and module != "lm_head":
                count += layer.weight.numel()
                if any(part in module for part in parts):
                    coarse += layer.weight.numel()
                    layer.weight.copy_(coarsen(layer.weight, bits))
    model.save_pretrained(scratch / "mixed-full")
    export_base(scratch / "mixed-full", scratch / "mixed-base", bits=4, overwrite=True)
    trainer = make_trainer(
        data, scratch / "mixed", seed, scratch / "mixed-base", base_bits=4, num_rounds=1, max_steps=STEPS,
        broadcast="never", control_variate=1.0, control_variate_runs=RUNS,
    )  # fmt: skip
    trainer.train()
    records = trainer.server.store.records()
    yield "bits in the mean (no loss)", 4 - (4 - bits) * coarse / count
    yield "the base, which clients hold", loss_of(records[0]["metrics"]["proxy"])
    yield f"server, {RUNS} runs", loss_of(records[-1]["metrics"]["server"])
    trainer.owner.close()


def try_steps(data: Mapping[str, Any], bits: int, seed: int, scratch: Path) -> Lines:
    """Local steps in the one round, and how much of the update is the quantizer's."""
    for steps in (10, 20, STEPS, 2 * STEPS):
        trainer = make_trainer(
            data, scratch / "steps", seed, base_bits=bits, num_rounds=1, max_steps=steps, broadcast="never"
        )
        trainer.train()
        start, _ = trainer.server.store.load(0)
        delta = {key: value - start[key] for key, value in trainer.server.adapter.items()}
        variate, _ = trainer.owner.estimate_variate(start, 1, [seed * RUNS + run for run in range(RUNS)])
        yield f"{steps} steps: ‖variate‖/‖Δ̄‖ (no loss)", global_norm(variate) / global_norm(delta)
        yield f"{steps} steps: no variate", loss_of(trainer.owner.evaluate(move(start, delta)))
        yield f"{steps} steps: variate of {RUNS} runs", loss_of(trainer.owner.evaluate(move(start, delta, variate)))
        trainer.owner.close()


def try_server_mean(data: Mapping[str, Any], bits: int, seed: int, scratch: Path) -> Lines:
    """The server's model as the mean of its later adapters: it cancels chance, and attackers can do the same."""
    trainer = make_trainer(data, scratch / "mean", seed, base_bits=bits, num_rounds=4, max_steps=STEPS // 4)
    trainer.train()
    adapters = [trainer.server.store.load(number)[0] for number in range(1, 5)]
    yield "broadcast every round: server", loss_of(trainer.owner.evaluate(adapters[-1]))
    yield (
        "broadcast every round: mean of the server's last two",
        loss_of(trainer.owner.evaluate(average_updates(adapters[2:], [1.0, 1.0]))),
    )
    trainer.owner.close()


def summarize(lines: Sequence[Mapping[str, str]]) -> str:
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in lines:
        groups[line["base"], line["variant"]].append(float(line["value"]))
    text, last = ["| base | variant | mean | seeds |", "|---|---|---|---|"], ""
    for (base, variant), values in groups.items():
        seeds = " ".join(f"{value:.3f}" for value in values)
        text.append(f"| {base if base != last else ''} | {variant} | {statistics.fmean(values):.3f} | {seeds} |")
        last = base
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=STORIES, default="rnnlg")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--csv", type=Path, default=Path("out/defences/defences.csv"))
    parser.add_argument("--scratch", type=Path, default=Path("out/defences"))
    arguments = parser.parse_args()
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")
    data = prepare_stories(arguments.task)
    warm_up(data, arguments.scratch)
    rows = data["owner_dataset"]
    # The smallest domain's few rows would be another question.
    domain = statistics.mode(rows["domain"])
    other_rows = {
        "one domain": rows.filter(lambda row: row["domain"] == domain),
        "its own completions": relabel(rows, data),
    }
    lines: list[dict[str, Any]] = list(read_lines(arguments.csv))
    done = {(line["base"], line["part"], str(line["seed"])) for line in lines}
    for seed in arguments.seeds:
        scratch = arguments.scratch / f"seed-{seed}"
        parts = {
            ("4 bits", "estimates"): try_estimates(data, other_rows, 4, seed, scratch),
            ("4 bits", "server's mean"): try_server_mean(data, 4, seed, scratch),
            ("3 bits", "estimates"): try_estimates(data, other_rows, 3, seed, scratch),
            **{(f"{bits} bits", "compensation"): try_compensation(data, bits, seed, scratch) for bits in (4, 3)},
            **{(f"{bits} bits", "steps"): try_steps(data, bits, seed, scratch) for bits in (4, 3)},
            **{(name, "mixed"): try_mixed_bits(data, name, seed, scratch) for name in MIXED},
        }
        for (base, part), found in parts.items():
            if (base, part, str(seed)) in done:
                continue
            for variant, value in found:
                line = {"base": base, "part": part, "seed": seed, "variant": variant, "value": round(value, 4)}
                lines.append(line)
                print(f"seed {seed}, {base}: {variant} {value:.4f}", flush=True)
            write_lines(arguments.csv, lines)
    print(summarize([{key: str(value) for key, value in line.items()} for line in lines]))


if __name__ == "__main__":
    main()
