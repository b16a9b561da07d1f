# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Memory and time of a federation with very many clients: a tiny Llama, one step for each client in each round.

    python -m benchmarks.many_clients --clients 10000 --rounds 3 [--plot out/many_clients.png]

Prints a line per round: its seconds, the milliseconds per client, and the peak of anonymous memory in it, less what there
was before the first round; at the end the memory over time as a picture.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedlpp_hf import FederatedConfig, FederatedTrainer, export_base


ROWS, LENGTH, VOCABULARY = 4, 16, 64  # of each client; of a row


class MemoryTrace:
    """Anonymous memory of this process over time: (seconds, MB), sampled twenty times a second."""

    def __init__(self):
        self.samples: list[tuple[float, float]] = []
        self._began, self._stop = time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stop.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            (anonymous,) = (int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))
            self.samples.append((self.now(), anonymous))

    def now(self) -> float:
        return time.perf_counter() - self._began

    def peak(self, start: float, end: float) -> float:
        return max(memory for moment, memory in self.samples if start <= moment <= end)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def make_base(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder / "full")
    export_base(folder / "full", folder / "base", bits=4, model_class=AutoModelForCausalLM)
    return folder / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder)
        count = options.clients * ROWS
        ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
        rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
        del ids
        args = FederatedConfig(
            str(folder / "out"),
            num_rounds=options.rounds,
            num_clients=options.clients,
            max_steps=1,
            per_device_train_batch_size=ROWS,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        trace = MemoryTrace()
        trainer = FederatedTrainer(str(base), args, train_dataset=rows, peft_config=lora)
        start = trace.now()
        print(f"{options.clients} clients: trainer made in {start:.1f} s")
        trainer.train()
        end = trace.now()
        trace.stop()
        before = trace.peak(start - 0.2, start + 0.1)
        seconds = [record["seconds"] for record in trainer.server.store.records()[1:]]
        moment = end - sum(seconds)
        for number, took in enumerate(seconds, 1):
            grown = trace.peak(moment, moment + took) - before
            print(
                f"round {number}: {took:.1f} s, {1000 * took / options.clients:.1f} ms per client, "
                f"peak {grown:+.0f} MB above {before:.0f} MB before the rounds"
            )
            moment += took
        if options.plot:
            draw(trace, start, options)


def draw(trace: MemoryTrace, start: float, options: argparse.Namespace) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*zip(*trace.samples, strict=True), color="#0b6e4f")
    axes.axvline(start, linestyle="--", color="#555555", label="first round begins")
    axes.set_title(f"{options.clients} clients, {options.rounds} rounds of one step", fontsize=10)
    axes.set_xlabel("seconds")
    axes.set_ylabel("anonymous memory, MB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=130)


if __name__ == "__main__":
    main()
