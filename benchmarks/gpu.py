# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The whole chain on one device, in one command and without a download: what must be equal to the bit, and what it costs.

    python -m benchmarks.gpu [--model out/smollm2] [--json out/gpu.json]

On a GPU the model is a Llama of 200 M random weights, on a CPU one of 6 M; `--model` names a causal language model instead. Checked:
export, the base in the device's memory, proxies, a resumed federation, the merge. Timed: export, a client's run beside a plain
PyTorch loop of the same steps (QLoRA in float32, and with bfloat16 autocast where the device multiplies it), proxies, the merge on
the device beside the merge on the CPU. Each figure is a median; memory is the most that the device's allocator held. Takes three
minutes on two CPU cores.
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedlpp_hf import FederatedConfig, FederatedTrainer, RoundStore, export_base, load_base, merge_adapter
from fedlpp_hf.base.reader import BaseReader
from fedlpp_hf.tensors.adapters import copy_adapter, load_adapter_, write_adapter
from fedlpp_hf.tensors.atomic import hash_file
from fedlpp_hf.tensors.quantization import quantize_tensors
from fedlpp_hf.wire.encoding import restore_tensors
from fedlpp_hf.wire.messages import ClientTask


BATCH, LENGTH, STEPS = 8, 80, 10
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
Checks = dict[str, bool]
Times = dict[str, float]


class Bench:
    """A full model, its base, and what is measured of them on `device`."""

    def __init__(self, model: str | None, scratch: Path, repeats: int):
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.scratch, self.repeats = scratch, repeats
        self.full = Path(model) if model else write_llama(scratch / "full", self.on_gpu)
        self.vocabulary = AutoConfig.from_pretrained(self.full).vocab_size
        self.checks: Checks = {}
        self.times: Times = {}
        self.ratios: dict[str, list[float]] = {}  # of a client's run to the plain loop, by dtype

    def run(self) -> None:
        self.export()
        self.load()
        self.resume()
        for bf16 in (False, True) if self.has_bfloat16() else (False,):
            self.train(bf16)
        self.proxies()
        self.merge()

    def time(self, name: str, call: Callable[[], Any], repeats: int | None = None) -> Any:
        """The median of `call`'s seconds, after a first call that warms up; returns its last result."""
        found = [self.clock(call) for _ in range(1 + (self.repeats if repeats is None else repeats))]
        self.times[name] = statistics.median(seconds for _, seconds in found[1:])
        return found[-1][0]

    def clock(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """`call`'s result and its seconds, to the end of the device's work."""
        self.wait()
        began = time.perf_counter()
        result = call()
        self.wait()
        return result, time.perf_counter() - began

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def export(self) -> None:
        bases = [self.scratch / name for name in ("base", "again")]
        manifests = [export_base(self.full, base, model_class=AutoModelForCausalLM) for base in bases]
        self.checks["two exports are the same files"] = manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
        self.time(
            "export", lambda: export_base(self.full, bases[1], model_class=AutoModelForCausalLM, overwrite=True), 1
        )
        self.base = bases[0]

    def load(self) -> None:
        model = load_base(self.base, AutoModelForCausalLM).to(self.device)
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in AutoModelForCausalLM.from_pretrained(self.full).state_dict().items()
        }
        reader = BaseReader(self.base, shapes, set())
        layers = {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
        self.checks["the base in memory is the base on disk"] = bool(layers) and all(
            torch.equal(
                dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu(),
                reader.read(f"{name}.weight").float(),
            )
            for name, layer in layers.items()
        )

    def make_trainer(self, output_dir: Path, rounds: int, clients: int, bf16: bool | None = None) -> FederatedTrainer:
        generator = torch.Generator().manual_seed(0)
        count = clients * BATCH * STEPS
        ids = torch.randint(10, self.vocabulary, (count, LENGTH), generator=generator).tolist()
        rows = Dataset.from_dict(
            {"input_ids": ids, "labels": ids, "client": [str(row % clients) for row in range(count)]}
        )
        args = FederatedConfig(
            str(output_dir), num_rounds=rounds, partition="client", per_device_train_batch_size=BATCH, max_steps=STEPS,
            learning_rate=1e-3, lr_scheduler_type="constant", adapter_bits=4, disable_tqdm=True, report_to=[], seed=0,
            use_cpu=not self.on_gpu, bf16=self.has_bfloat16() if bf16 is None else bf16,
        )  # fmt: skip
        return FederatedTrainer(load_base(self.base, AutoModelForCausalLM), args, train_dataset=rows, peft_config=LORA)

    def has_bfloat16(self) -> bool:
        """Whether this device multiplies bfloat16 faster than float32."""
        if self.on_gpu:
            return torch.cuda.is_bf16_supported()
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))

    def resume(self) -> None:
        ends = []
        for name, parts in (("whole", (2,)), ("resumed", (1, 2))):
            for part in parts:
                self.make_trainer(self.scratch / name, part, 2).train(
                    resume_from_checkpoint=part == 2 and len(parts) == 2
                )
            ends.append(RoundStore(self.scratch / name).load(2)[0])
        self.checks["a resumed federation is the uninterrupted one"] = all(
            torch.equal(value, ends[1][key]) for key, value in ends[0].items()
        )

    def train(self, bf16: bool) -> None:
        dtype = "bfloat16" if bf16 else "float32"
        trainer = self.make_trainer(self.scratch / f"round-{dtype}", 1, 1, bf16)
        parameters = list(trainer.guard.parameters.values())
        start = copy_adapter(trainer.guard.parameters)
        task = ClientTask("benchmark", 1, 1, "0", 7, trainer.guard.fingerprint, start)
        batches = [
            {key: torch.tensor(rows[key]).to(self.device) for key in ("input_ids", "labels")}
            for rows in trainer.client_datasets["0"].iter(BATCH)
        ]

        def loop() -> None:
            load_adapter_(trainer.guard.parameters, start)
            optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
            trainer.model.train()
            for batch in batches[:STEPS]:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    loss = trainer.model(**batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()

        gc.collect()
        gc.freeze()  # as `train()` does for the whole federation
        calls: dict[str, Callable[[], Any]] = {
            f"a client's run, {dtype}": lambda: trainer.train_client(task),
            f"plain loop, {dtype}": loop,
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(1 + self.repeats):
            for name, call in calls.items():  # in turn, so that both meet the same weather
                if self.on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                seconds[name].append(self.clock(call)[1])
                if self.on_gpu:
                    self.times[f"memory of {name}, MB"] = torch.cuda.max_memory_allocated() / 2**20
        self.times |= {name: statistics.median(values[1:]) for name, values in seconds.items()}
        self.ratios[dtype] = [
            one / other for one, other in zip(*(values[1:] for values in seconds.values()), strict=True)
        ]
        gc.unfreeze()

    def proxies(self) -> None:
        generator = torch.Generator().manual_seed(1)
        adapter = {str(number): torch.randn(2048, 512, generator=generator) for number in range(10)}
        there = {key: tensor.to(self.device) for key, tensor in adapter.items()}
        for bits in (2, 4, 8):
            here = quantize_tensors(adapter, bits)
            far = self.time(f"10 M values to {bits} bits", lambda bits=bits: quantize_tensors(there, bits))
            same = (torch.equal(value.cpu(), restored) for value, restored in zip(
                restore_tensors(far).values(), restore_tensors(here).values(), strict=True))  # fmt: skip
            self.checks[f"a proxy of {bits} bits is the CPU's"] = all(same)

    def merge(self) -> None:
        trainer = self.make_trainer(self.scratch / "shapes", 1, 1)
        generator = torch.Generator().manual_seed(2)
        adapter = {
            key: 0.02 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in copy_adapter(trainer.guard.parameters).items()
        }
        write_adapter(self.scratch / "adapter", adapter, trainer.server.peft_config if trainer.server else LORA)
        digests = {}
        for device in dict.fromkeys(("cpu", self.device.type)):
            merged = self.scratch / f"merged-{device}"

            def call(device: str = device, merged: Path = merged) -> None:
                for path in merged.iterdir() if merged.exists() else ():
                    path.unlink()
                merge_adapter(self.full, self.scratch / "adapter", merged, device=device, sync=False)

            self.time(f"merge on {device}", call)
            digests[device] = [hash_file(path) for path in sorted(merged.glob("*.safetensors"))]
        self.checks["the merge is the CPU's"] = digests["cpu"] == digests[self.device.type]


def write_llama(directory: Path, large: bool) -> Path:
    """A Llama of random weights, in bfloat16 on a GPU and in float32 on a CPU."""
    torch.manual_seed(0)
    sizes = (
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 32000}
        if large
        else {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 4000}
    )
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=8, tie_word_embeddings=False, max_position_embeddings=256)
    )
    model.to(torch.bfloat16 if large else torch.float32).save_pretrained(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a causal language model; by default one of random weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.model, Path(scratch), options.repeats)
        machine = torch.cuda.get_device_name() if bench.on_gpu else f"CPU, {torch.get_num_threads()} threads"
        bench.run()
    times = bench.times
    print(
        f"{machine}; torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}\n\n| check | equal bits |\n|---|---|"
    )
    print("\n".join(f"| {name} | {'yes' if equal else '**no**'} |" for name, equal in bench.checks.items()))
    print("\n| what | |\n|---|---|")
    print(
        "\n".join(
            f"| {name} | {value:.0f} |" if "MB" in name else f"| {name} | {value:.3f} s |"
            for name, value in times.items()
        )
    )
    for dtype, ratios in bench.ratios.items():
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        print(f"| a client's run / plain loop, {dtype} (quartiles) | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "machine": machine,
            "platform": platform.platform(),
            "checks": bench.checks,
            "times": times,
            "ratios": bench.ratios,
        }
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if not all(bench.checks.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
