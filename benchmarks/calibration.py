# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The loss of a real model's base, rounded to the nearest codes or calibrated on rows of the owner.

    python -m benchmarks.calibration --model out/smollm2 --csv docs/calibration.csv       about 5 minutes of one core

SmolLM2-135M-Instruct and E2E by its chat template, as in `benchmarks.real_model`: moments from rows of the validation split, loss on
48 test rows. Embeddings are at 4 bits throughout. The base is held as the floats that clients compute with, in bfloat16 products. It
needs the shared data folder beside the checkout. Lines that the CSV has already are not measured again.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from benchmarks.convergence import SHARED
from benchmarks.privacy_frontier import read_lines, write_lines
from benchmarks.real_model import prepare
from fedlpp_hf.base.calibration import Calibration, measure_moments
from fedlpp_hf.base.quantize import BaseSettings, quantize_base_tensor, quantize_nf4, restore_nf4


ROWS = 48
# The bits of most weights, and of those whose name has the second part.
BITS: dict[str, tuple[int, str, int]] = {
    "3 bits": (3, "", 3),
    "2 bits": (2, "", 2),
    "4 bits": (4, "", 4),
    "3 bits, 4 in down_proj": (3, "down_proj", 4),
    "2 bits, 4 in down_proj": (2, "down_proj", 4),
    "2 bits, 3 in down_proj": (2, "down_proj", 3),
}


class Model:
    """The full model, in whose place each base is held."""

    def __init__(self, directory: str):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.collate = DataCollatorForSeq2Seq(self.tokenizer)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        embeddings = self.model.get_input_embeddings().weight
        settings = make_settings(4, None)
        entry, tensors = quantize_base_tensor("embeddings", embeddings.detach(), settings)
        assert entry["kind"] == "codebook"
        self.owner = self.measure()
        embeddings.data = tensors["embeddings"]
        head = self.model.get_output_embeddings()
        linears = {
            name: m for name, m in self.model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head
        }
        self.weights = {f"{name}.weight": module.weight for name, module in linears.items()}
        self.full = {name: weight.data for name, weight in self.weights.items()}

    def rows(self, split: str, count: int) -> Iterator[dict[str, torch.Tensor]]:
        dataset: Dataset = prepare(split, self.tokenizer).take(count).remove_columns("client")
        rows = list(dataset)
        for start in range(0, count, 8):
            yield self.collate(rows[start : start + 8])

    @torch.no_grad()
    def measure(self) -> float:
        """The mean of the test batches' losses."""
        with torch.autocast("cpu", torch.bfloat16):
            losses = [self.model(**batch).loss.item() for batch in self.rows("test", 48)]
        return sum(losses) / len(losses)

    def calibrate(self, directory: str) -> Calibration:
        def run() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                for batch in self.rows("validation", ROWS):
                    self.model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

        # The mask is looked for at the module that is called.
        found = measure_moments(self.model.model, run, ROWS, directory)
        return Calibration({f"model.{name}": path for name, path in found.files.items()}, found.rows)

    def hold(self, bits: str, calibration: Calibration | None) -> float:
        """Hold a base in the model's place. Returns the weights' relative error."""
        most, part, other = BITS[bits]
        error = size = 0.0
        for name, weight in self.weights.items():
            settings = make_settings(other if part and part in name else most, calibration)
            full = self.full[name]
            weight.data = restore_nf4(name, quantize_nf4(name, full, settings))
            error += float((weight.data - full).square().sum())
            size += float(full.square().sum())
        return (error / size) ** 0.5


def make_settings(bits: int, calibration: Calibration | None) -> BaseSettings:
    return BaseSettings(bits, 64, False, 4, {}, set(), calibration=calibration)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/smollm2", help="directory of SmolLM2")
    parser.add_argument("--bits", nargs="+", choices=list(BITS), metavar="BITS", default=list(BITS))
    parser.add_argument("--csv", type=Path, default=Path("out/calibration.csv"))
    arguments = parser.parse_args()
    if not (SHARED / "data").is_dir():
        raise SystemExit("This benchmark needs the shared data folder beside the checkout.")
    lines: list[dict[str, Any]] = list(read_lines(arguments.csv))

    def add(bits: str, rounding: str, loss: float, error: float, began: float) -> None:
        line = {"base": bits, "rounding": rounding, "loss": round(loss, 4), "error of the weights": round(error, 4)}
        lines.append(line | {"s": round(time.process_time() - began)})
        print(", ".join(f"{key} {value}" for key, value in lines[-1].items()), flush=True)
        write_lines(arguments.csv, lines)

    done = {(line["base"], line["rounding"]) for line in lines}
    began = time.process_time()
    model = Model(arguments.model)
    if ("full model", "") not in done:
        add("full model", "", model.owner, 0.0, began)
    with tempfile.TemporaryDirectory() as scratch:
        calibration = model.calibrate(scratch)
        for bits in arguments.bits:
            for rounding, chosen in (("calibrated", calibration), ("nearest", None)):
                if (bits, rounding) not in done:
                    began = time.process_time()
                    error = model.hold(bits, chosen)
                    add(bits, rounding, model.measure(), error, began)


if __name__ == "__main__":
    main()
