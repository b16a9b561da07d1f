# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a marked base survives: whose copy a model came from, after what its holders may have done to it.

    python -m benchmarks.tracing [--steps 1000] [--keys 10000]
    python -m benchmarks.tracing --loss out/smollm2      what the marks cost: the loss of ten marked bases and of the unmarked one

all-MiniLM-L6-v2 (its package carries it), a 4-bit base, 30 clients. One client's copy is changed, or ten of them are put
together; each time the best score among those who took part, the best among the innocent, and the bound on a false alarm are
printed. Fine-tuning is full (all weights, AdamW) on TREC, where its folder is there, else on random token ids.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
)

from benchmarks import real_model
from benchmarks.convergence import SHARED, read_rows
from benchmarks.encoder import find_encoder
from fedlpp_hf import export_base, load_base
from fedlpp_hf.base.mark_keys import MarkKey, prepare_mark
from fedlpp_hf.base.marking import trace_base
from fedlpp_hf.base.reader import BaseReader
from fedlpp_hf.privacy.marks import Mark, Tracer
from fedlpp_hf.tensors.codebooks import codebook
from fedlpp_hf.tensors.quantization import restore_from_levels, round_to_levels


CLIENTS = [f"client-{number:02d}" for number in range(30)]
COALITION = CLIENTS[: len(CLIENTS) // 3]
Weights = dict[str, torch.Tensor]


def make_copies(folder: Path, full_model: Path) -> tuple[MarkKey, dict[str, Weights]]:
    """The key, and the weights that each of the coalition's clients computes with."""
    settings = {"bits": 4, "block_size": 64, "skip_modules": None, "model_class": None}
    copies = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in AutoModel.from_pretrained(full_model).state_dict().items()}
    for client in CLIENTS:
        mark = prepare_mark(folder / "key.json", client, full_model, settings)
        if client in COALITION:
            export_base(full_model, folder / "base", mark=mark, overwrite=True)
            reader = BaseReader(folder / "base", shapes, set())
            copies[client] = {name: reader.read(name) for name in reader.entries if reader.is_quantized(name)}
    return MarkKey.read(folder / "key.json"), copies


def add_adapter(weights: Weights) -> Weights:
    """ΔW of rank 8 whose norm is a tenth of the weight's, larger than local training makes it."""
    generator = torch.Generator().manual_seed(1)
    changed = {}
    for name, weight in weights.items():
        delta = torch.randn(len(weight), 8, generator=generator) @ torch.randn(8, weight.shape[1], generator=generator)
        changed[name] = weight + delta * (0.1 * weight.norm() / delta.norm())
    return changed


def requantize(weights: Weights, bits: int) -> Weights:
    """Another quantizer of `bits` bits, in blocks of 32 that begin elsewhere."""
    levels = codebook(bits)
    return {
        name: restore_from_levels(*round_to_levels(weight.T.contiguous(), levels, 32), levels, 32)
        .view(weight.T.shape)
        .T
        for name, weight in weights.items()
    }


def prune(weights: Weights, share: float) -> Weights:
    """The smallest `share` of each matrix set to zero."""
    return {
        name: weight * (weight.abs() > weight.abs().flatten().kthvalue(int(share * weight.numel())).values)
        for name, weight in weights.items()
    }


def put_together(copies: list[Weights], how: str) -> Weights:
    """What a coalition can make of its copies: their mean, each position's majority, minority, or one drawn by chance."""
    made = {}
    generator = torch.Generator().manual_seed(2)
    for name in copies[0]:
        stack = torch.stack([copy[name] for copy in copies])
        low, high = stack.min(0).values, stack.max(0).values
        above = (stack == high).sum(0)
        if how == "mean":
            made[name] = stack.mean(0)
        elif how == "splice":
            chosen = torch.randint(len(copies), low.shape, generator=generator)
            made[name] = stack.gather(0, chosen[None])[0]
        else:
            majority = torch.where(2 * above > len(copies), high, low)
            made[name] = majority if how == "majority" else torch.where(majority == high, low, high)
    return made


def fine_tune(full_model: Path, weights: Weights, steps: int) -> Weights:
    """All weights, AdamW at 2e-5, 16 rows a step, on a task with labels."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(full_model, num_labels=6)
    own = model.state_dict()
    for name, weight in weights.items():
        own[f"bert.{name}"].copy_(weight)
    path = SHARED / "data" / "trec" / "train.jsonl"
    if path.exists():
        rows = read_rows("trec/train.jsonl", 5000)
        tokens = AutoTokenizer.from_pretrained(full_model)(
            rows["text"][:], padding="max_length", truncation=True, max_length=24, return_tensors="pt"
        )
        ids, labels = tokens["input_ids"], torch.tensor(rows["label"][:])
    else:
        ids, labels = torch.randint(1000, 20000, (5000, 24)), torch.randint(6, (5000,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(ids), (16,))
        mask = (ids[chosen] != 0).long()
        model(input_ids=ids[chosen], attention_mask=mask, labels=labels[chosen]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: own[f"bert.{name}"].clone() for name in weights}


def list_attacks(full_model: Path, copies: dict[str, Weights], steps: int) -> Iterator[tuple[str, list[str], Weights]]:
    """Name, who took part, and the weights of the suspect."""
    first = CLIENTS[0]
    changes: dict[str, Callable[[Weights], Weights]] = {
        "the copy as it is": lambda weights: weights,
        "an adapter merged in": add_adapter,
        "an adapter merged in, requantized to 4 bits": lambda weights: requantize(add_adapter(weights), 4),
        "an adapter merged in, requantized to 3 bits": lambda weights: requantize(add_adapter(weights), 3),
        "30 % pruned": lambda weights: prune(weights, 0.3),
        f"{steps} steps of full fine-tuning": lambda weights: fine_tune(full_model, weights, steps),
    }
    for name, change in changes.items():
        yield name, [first], change(copies[first])
    for size in (2, 3, 5, 10):
        group = COALITION[:size]
        for how in ("mean", "majority", "minority", "splice"):
            yield f"{size} of 30: {how}", group, put_together([copies[client] for client in group], how)


def count_false_alarms(values: np.ndarray, keys: int, threshold: float) -> tuple[int, float]:
    """How many of `keys` other owners' keys accuse their one client, and the least bound among them."""
    alarms, least = 0, 1.0
    for number in range(keys):
        tracer = Tracer(number.to_bytes(32, "big"), ["innocent"])
        tracer.add("weight", values)
        (found,) = tracer.results()
        alarms, least = alarms + (found.false_alarm <= threshold), min(least, found.false_alarm)
    return alarms, least


def main() -> None:
    """Print the table of attacks, the false alarms and the cost of the marks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of full fine-tuning")
    parser.add_argument("--keys", type=int, default=10_000, help="other owners' keys, for false alarms")
    parser.add_argument(
        "--loss", metavar="DIR", help="directory of SmolLM2: only what its marked bases lose, on 48 rows of E2E"
    )
    options = parser.parse_args()
    if options.loss:
        compare_losses(Path(options.loss))
        return
    full_model = find_encoder()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        key, copies = make_copies(folder, full_model)
        model = AutoModel.from_pretrained(full_model)
        print("| suspect | found | least score of a guilty client | best innocent score | bound on a false alarm |")
        print("|---|---|---|---|---|")
        for name, guilty, weights in list_attacks(full_model, copies, options.steps):
            state = model.state_dict()
            model.load_state_dict(state | weights)
            model.save_pretrained(folder / "suspect")
            model.load_state_dict(state)
            found = trace_base(folder / "suspect", key)
            accused = [trace.client for trace in found if trace.false_alarm <= 1e-6]
            wrong = [client for client in accused if client not in guilty]
            least = min(trace.score for trace in found if trace.client in guilty)
            innocent = max(trace.score for trace in found if trace.client not in guilty)
            bound = found[0].false_alarm
            text = "below 1e-300" if bound < 1e-300 else f"{bound:.0e}"
            print(
                f"| {name} | {len(accused)} of {len(guilty)}{', WRONGLY: ' + wrong[0] if wrong else ''} | {least:.1f} | "
                f"{innocent:.1f} | {text} |",
                flush=True,
            )
        choices = np.where(np.random.default_rng(0).random(68_000) < 0.5, 1.0, -1.0)
        alarms, least = count_false_alarms(choices, options.keys, 1e-6)
        print(
            f"{options.keys} other keys, 68,000 positions: {alarms} false alarms at 1e-6; the least bound is {least:.1e}"
        )
        plain = load_base(export(full_model, folder / "plain", None), AutoModel)
        marked = load_base(export(full_model, folder / "marked", Mark(b"k" * 32, "a")), AutoModel)
        print(f"Outputs of the marked base differ from the full model's by {compare(model, marked):.4f} of their norm, "
              f"those of the unmarked one by {compare(model, plain):.4f}.")  # fmt: skip


def export(full_model: Path, directory: Path, mark: Mark | None) -> Path:
    """A 4-bit base with or without a mark."""
    export_base(full_model, directory, mark=mark)
    return directory


@torch.no_grad()
def compare_losses(full_model: Path) -> None:
    """Print the mean loss per token of the unmarked base, and how far each marked one's is from it."""
    tokenizer = AutoTokenizer.from_pretrained(full_model)
    rows = list(real_model.prepare("test", tokenizer).take(48).remove_columns("client"))
    collate = DataCollatorForSeq2Seq(tokenizer)
    batches = [collate(rows[start : start + 8]) for start in range(0, len(rows), 8)]

    def measure(mark: Mark | None) -> float:
        with tempfile.TemporaryDirectory() as folder:
            model = load_base(export(full_model, Path(folder) / "base", mark), AutoModelForCausalLM).eval()
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        losses = [model(**batch).loss.item() * count for batch, count in zip(batches, counts, strict=True)]
        return sum(losses) / sum(counts)

    plain = measure(None)
    print(f"unmarked: {plain:.5f}", flush=True)
    for client in CLIENTS[:10]:
        marked = measure(Mark(b"k" * 32, client))
        print(f"{client}: {marked:.5f}, {marked / plain - 1:+.4%}", flush=True)


@torch.no_grad()
def compare(model: torch.nn.Module, other: torch.nn.Module) -> float:
    """Relative distance of two models' outputs on random token ids."""
    ids = torch.randint(1000, 20000, (32, 24), generator=torch.Generator().manual_seed(3))
    one, two = (m.eval()(input_ids=ids).last_hidden_state for m in (model, other))
    return math.sqrt(float((one - two).square().sum() / one.square().sum()))


if __name__ == "__main__":
    main()
