# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""How fast updates become their mean: this library, a plain loop, `torch.stack`, Flower, and the floor, reading the files.

    python -m benchmarks.aggregation --clients 12 100 --dtypes float32 bfloat16 --repeats 5
    python -m benchmarks.aggregation --clients 10000 --dtypes float32 --repeats 1 --methods ours

Writes updates of a rank 16 adapter on all linear layers of an 8B Llama (41.9 M values) and has every method read and
average them, in turn, from the page cache; for more clients than `--files` the files have several names. Prints medians as
ratios to the floor, of the clock and of the processor's time, and the peak of anonymous memory above what the process held,
in adapters of float32. Every method reads in one thread; torch's own arithmetic may use `--threads`.
`--layers` makes smaller adapters, `--others` adds rules that do more than average. Flower takes part where it is installed;
it knows no bfloat16, and holds all updates and as many products at once.
"""

import argparse
import ctypes
import gc
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from fedlpp_hf.aggregation.mean import average_updates
from fedlpp_hf.aggregation.round import RoundUpdates
from fedlpp_hf.aggregation.rules import aggregate
from fedlpp_hf.tensors.files import TensorFile


RANK = 16
CHUNK = 2**15  # values, as `fedlpp_hf.aggregation.mean` has them
SIZES = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
SIZES |= {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}

Method = Callable[[list[Path]], object]


def adapter_shapes(layers: int) -> dict[str, tuple[int, int]]:
    shapes = {}
    for layer in range(layers):
        for name, (size_in, size_out) in SIZES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}_proj"
            shapes[f"{prefix}.lora_A.weight"] = (RANK, size_in)
            shapes[f"{prefix}.lora_B.weight"] = (size_out, RANK)
    return shapes


def write_updates(directory: Path, count: int, layers: int, dtype: torch.dtype) -> list[Path]:
    generator, paths = torch.Generator().manual_seed(0), []
    for client in range(count):
        paths.append(directory / f"update-{client}.safetensors")
        tensors = {
            key: torch.rand(shape, generator=generator).sub_(0.5).mul_(1e-3).to(dtype)
            for key, shape in adapter_shapes(layers).items()
        }
        save_file(tensors, paths[-1])
    return paths


def link_files(files: list[Path], count: int) -> list[Path]:
    """`count` names of `files`, in turn: what is kept for each file is kept for each client, and the disk holds few."""
    paths = [files[place % len(files)].with_suffix(f".client-{place}") for place in range(count)]
    for place, path in enumerate(paths):
        if not path.exists():
            path.hardlink_to(files[place % len(files)])
    return paths


class MemoryPeak:
    """The peak of this process's anonymous memory above its start, in bytes, sampled."""

    def __enter__(self):
        # What an earlier method has freed but the allocator has kept would count as memory of nobody.
        ctypes.CDLL(None).malloc_trim(0)
        self.start = self.peak = self.read()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _sample(self):
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self.read())

    @staticmethod
    def read() -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) * 1024


def read_files(paths: list[Path]) -> None:
    """The floor: every byte copied once, into one buffer that is there already after the first file."""
    buffer = bytearray(paths[0].stat().st_size)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            file.readinto(buffer)


def average_plainly(paths: list[Path]) -> None:
    """What one would write first."""
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        for key, tensor in load_file(path).items():
            total[key] = total.get(key, 0) + tensor.double() / len(paths)
    {key: tensor.float() for key, tensor in total.items()}


def average_stacked(paths: list[Path]) -> None:
    updates = [load_file(path) for path in paths]
    {key: torch.stack([update[key].float() for update in updates]).mean(0) for key in updates[0]}


def average_ours(paths: list[Path]) -> None:
    average_updates([TensorFile(path) for path in paths], [1.0] * len(paths))


def find_flower_methods() -> dict[str, Method]:
    try:
        from flwr.app import ArrayRecord, MetricRecord, RecordDict
        from flwr.server.strategy.aggregate import aggregate as aggregate_lists
        from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
    except ImportError:
        return {}

    def average_lists(paths):
        aggregate_lists([(list(load_arrays(path).values()), 1) for path in paths])

    def average_records(paths):
        records = [
            RecordDict(
                {
                    "arrays": ArrayRecord(list(load_arrays(path).values()), keep_input=True),
                    "metrics": MetricRecord({"n": 1}),
                }
            )
            for path in paths
        ]
        aggregate_arrayrecords(records, "n")

    return {"flower aggregate": average_lists, "flower arrayrecords": average_records}


def find_other_methods(shapes: dict[str, tuple[int, int]]) -> dict[str, Method]:
    zeros = {key: torch.zeros(shape) for key, shape in shapes.items()}

    def run(rule: str, robust: str = "none", num_attackers: int = 0) -> Method:
        def method(paths: list[Path]) -> None:
            files, weights = [TensorFile(path) for path in paths], [1.0] * len(paths)
            updates = RoundUpdates(files, weights, zeros, zeros, LoraConfig(r=RANK), num_attackers=num_attackers)
            aggregate(rule, updates, robust)

        return method

    return {
        "exact": run("exact"),
        "multi_krum": run("fedavg", robust="multi_krum", num_attackers=1),
        "median": run("fedavg", robust="median"),
    }


def measure(methods: dict[str, Method], files: list[Path], paths: list[Path], repeats: int, values: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    processor: dict[str, list[float]] = {name: [] for name in methods}
    peaks: dict[str, float] = dict.fromkeys(methods, 0.0)
    read_files(files)  # fills the page cache
    for method in methods.values():
        method(files[:1])  # loads what it needs
    for _ in range(repeats):
        for name, method in methods.items():
            gc.collect()
            with MemoryPeak() as memory:
                began, busy = time.perf_counter(), time.process_time()
                method(paths)
                seconds[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - busy)
            peaks[name] = max(peaks[name], (memory.peak - memory.start) / (4 * values))
    floor = next(iter(methods))
    print(
        f"| method | seconds | × {floor} | processor, × {floor} | anonymous memory, adapters |\n|---|---|---|---|---|"
    )
    for name in methods:
        ratios = [
            statistics.median(one / floor for one, floor in zip(taken[name], taken[floor], strict=True))
            for taken in (seconds, processor)
        ]
        cells = [
            f"{statistics.median(seconds[name]):.2f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{peaks[name]:.1f}",
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def measure_parts(file: Path, dtype: torch.dtype, repeats: int) -> None:
    """Prints what each step of the mean takes by itself, with a chunk's buffers in the cache."""
    values = torch.empty(CHUNK, dtype=dtype)
    wide, total = torch.zeros(CHUNK, dtype=torch.float64), torch.zeros(CHUNK, dtype=torch.float64)
    memory = values.view(torch.uint8).numpy().data
    with open(file, "rb", buffering=0) as opened:
        places = range(0, file.stat().st_size - len(memory), len(memory))
        steps: dict[str, Callable[[int], object]] = {
            "read": lambda place: os.preadv(opened.fileno(), [memory], place),
            "widen to float64": lambda _: wide.copy_(values),
            "add": lambda _: total.add_(wide, alpha=0.1),
        }
        found: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats):
            for name, step in steps.items():
                busy = time.process_time()
                for place in places:
                    step(place)
                found[name].append((time.process_time() - busy) / len(places) / CHUNK * 1e9)
    parts = ", ".join(f"{name} {statistics.median(taken):.2f}" for name, taken in found.items())
    print(f"\nNanoseconds of the processor for each value of {CHUNK} in the cache: {parts}.", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[12, 100])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-limit", type=float, default=6.0, help="GB; Flower is left out where it needs more")
    parser.add_argument(
        "--methods", nargs="+", help="of those that the table names; all by default; ratios are to the first"
    )
    parser.add_argument("--others", action="store_true", help="also exact products and robust rules: minutes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = adapter_shapes(args.layers)
    values = sum(a * b for a, b in shapes.values())
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as scratch:
            files = write_updates(
                Path(scratch), min(args.files, max(args.clients)), args.layers, getattr(torch, dtype)
            )
            for clients in args.clients:
                methods: dict[str, Method] = {
                    "reading": read_files,
                    "ours": average_ours,
                    "plain loop": average_plainly,
                    "torch.stack": average_stacked,
                }
                if dtype == "float32" and 2 * clients * values * 4 < args.memory_limit * 1e9:
                    methods |= find_flower_methods()
                if args.others:
                    methods |= find_other_methods(shapes)
                if args.methods:
                    methods = {name: methods[name] for name in args.methods}
                paths = link_files(files, clients)
                print(f"\n{clients} clients, {values / 1e6:.1f} M values, {dtype}, {args.threads} thread(s)\n")
                measure(methods, files, paths, args.repeats, values)
            measure_parts(files[0], getattr(torch, dtype), args.repeats)


if __name__ == "__main__":
    main()
