# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""How fast a full model becomes a base and an adapter becomes a proxy, against bitsandbytes, transformers and plain reading.

    python -m benchmarks.export [--gigabytes 0.5] [--bits 4 3 2 1] [--repeats 5] [--threads 2]

Writes a float32 Llama of random weights in shards, which stay in the page cache, and runs every method on it in turn:
`read` reads the files; `bitsandbytes` quantizes the Linears by `quantize_4bit` and keeps nothing; `transformers` is
`from_pretrained(quantization_config=...)` and `save_pretrained`; `export` is `export_base`, which also hashes what it
writes; `pack` and `unpack` are `pack_base` and `unpack_base`. Then an adapter of 42 M parameters is quantized and
dequantized. Rates are in millions of parameters per second of the clock and of the processor; ratios are to the rate of
`export` (or `quantize`) in the same turn. On a machine that has other work, look at the processor's.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from bitsandbytes.functional import quantize_4bit
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.merge import write_model
from fedlpp_hf.base.export import export_base
from fedlpp_hf.base.packing import pack_base, unpack_base
from fedlpp_hf.tensors.quantization import dequantize, quantize_tensors


RANK, BLOCK_SIZE = 16, 256
LLAMA_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]


def read_files(full: Path) -> int:
    """Read all shards; returns their parameters."""
    buffer, count = bytearray(1 << 24), 0
    for path in full.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                count += size // 4
    return count


def quantize_linears(full: Path) -> int:
    count = 0
    for path in full.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (a safe_open is no dict)
                if name.endswith("_proj.weight"):
                    weight = shard.get_tensor(name)
                    quantize_4bit(weight, blocksize=64, quant_type="nf4")
                    count += weight.numel()
    return count


def save_by_transformers(full: Path, out: Path) -> int:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(full, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(out)
    return read_parameters(full)


def read_parameters(full: Path) -> int:
    return sum(path.stat().st_size for path in full.glob("*.safetensors")) // 4  # but for the headers


def base_methods(full: Path, scratch: Path, bits: int) -> dict[str, Callable[[], int]]:
    """What is timed; each returns how many parameters it worked on."""

    def export() -> int:
        manifest = export_base(full, scratch / "base", bits=bits, overwrite=True)
        return manifest["totals"]["parameters"]

    def pack() -> int:
        pack_base(scratch / "base", scratch / "packed")
        return read_parameters(full)

    def unpack() -> int:
        unpack_base(scratch / "packed", scratch / "unpacked", overwrite=True)
        return read_parameters(full)

    ours = {"export": export, "read": lambda: read_files(full), "pack": pack, "unpack": unpack}
    if bits != 4:
        return ours
    return ours | {
        "bitsandbytes": lambda: quantize_linears(full),
        "transformers": lambda: save_by_transformers(full, scratch / "transformers"),
    }


def adapter_methods(bits: int) -> dict[str, Callable[[], int]]:
    """An adapter of rank 16 on all Linears of a Llama of 8 B parameters."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(32):
        for number, (rows, columns) in enumerate(LLAMA_8B):
            tensors[f"{layer}.{number}.lora_A"] = torch.randn(RANK, columns, generator=generator)
            tensors[f"{layer}.{number}.lora_B"] = torch.randn(rows, RANK, generator=generator)
    count = sum(tensor.numel() for tensor in tensors.values())
    proxy = quantize_tensors(tensors, bits, BLOCK_SIZE)

    def count_after(work: Callable[[], object]) -> Callable[[], int]:
        return lambda: (work(), count)[1]

    methods = {
        "quantize": count_after(lambda: quantize_tensors(tensors, bits, BLOCK_SIZE)),
        "dequantize": count_after(lambda: [dequantize(value) for value in proxy.values()]),
        "copy": count_after(lambda: [tensor.clone() for tensor in tensors.values()]),
    }
    if bits == 4:
        methods["bitsandbytes"] = count_after(
            lambda: [quantize_4bit(t, blocksize=BLOCK_SIZE, quant_type="nf4") for t in tensors.values()]
        )
    return methods


def measure(methods: dict[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Medians and quartiles of every method's rates, and of their ratios to the first method's, turn by turn."""
    rates: dict[str, dict[str, list[float]]] = {name: {"clock": [], "processor": []} for name in methods}
    for turn in range(repeats + 1):
        for name, work in methods.items():
            began, busy = time.perf_counter(), time.process_time()
            count = work()
            seconds, cpu = time.perf_counter() - began, time.process_time() - busy
            if turn:  # the first one warms up
                rates[name]["clock"].append(count / seconds / 1e6)
                rates[name]["processor"].append(count / cpu / 1e6)
    first = rates[next(iter(methods))]
    results: dict[str, dict[str, list[float]]] = {}
    for name, found in rates.items():
        results[name] = {}
        for kind, values in found.items():
            ratios = [value / base for value, base in zip(values, first[kind], strict=True)]
            results[name] |= {kind: summarize(values), f"{kind}_ratio": summarize(ratios)}
    return results


def summarize(values: list[float]) -> list[float]:
    """Median and both quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [statistics.median(values), low, high]


def report(what: str, results: dict[str, dict[str, list[float]]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"what": what, **results}), flush=True)
        return
    print(f"\n{what}\n")
    print("| method | M parameters/s | ratio | M parameters/s of processor | ratio |")
    print("|---|---|---|---|---|")
    for name, found in results.items():
        cells = [
            f"{found[key][0]:.{digits}f} ({found[key][1]:.{digits}f} to {found[key][2]:.{digits}f})"
            for key, digits in (("clock", 0), ("clock_ratio", 2), ("processor", 0), ("processor_ratio", 2))
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2, 1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true", help="print results as JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="export-benchmark-") as folder:
        full = Path(folder, "full")
        full.mkdir()
        write_model(full, options.gigabytes, "float32", 300_000_000)
        size = read_parameters(full)
        for bits in options.bits:
            what = f"base of {bits} bits, {size / 1e6:.0f} M parameters in float32, {options.threads} threads"
            report(what, measure(base_methods(full, Path(folder), bits), options.repeats), options.json)
    for bits in options.bits:
        what = f"adapter of 42 M parameters, {bits} bits in blocks of {BLOCK_SIZE}"
        report(what, measure(adapter_methods(bits), options.repeats), options.json)


if __name__ == "__main__":
    main()
