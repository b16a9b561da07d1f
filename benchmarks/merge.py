# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""How fast an adapter gets into a full model: this library, PEFT, a plain stream, and the floor, copying the files.

    python -m benchmarks.merge --gigabytes 1 --dtypes float32 bfloat16 --repeats 5

Writes a Llama of random weights in shards and merges with every method in turn, each in a fresh process, with the source
in the page cache and the destination not synced, unless `--sync`. Prints medians as ratios to the floor, and the peak of anonymous and
resident memory, of the whole process and above what the imports take. On a machine that has other work, look at
processor time: there, seconds say little. After the ratios in seconds are their quartiles.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


METHODS = ("floor", "ours", "stream", "peft")


def write_model(directory: Path, gigabytes: float, dtype_name: str, shard_bytes: int) -> None:
    """A sharded Llama of about that size; layers of 2048 to 4096 columns, as real ones have."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = getattr(torch, dtype_name)
    hidden = 2048 if gigabytes < 4 else 4096
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "vocab_size": 8000}
    layer = 4 * hidden**2 + 3 * hidden * sizes["intermediate_size"]
    layers = max(round((gigabytes * 1e9 / dtype.itemsize - 2 * 8000 * hidden) / layer), 1)
    config = LlamaConfig(num_hidden_layers=layers, num_attention_heads=hidden // 128, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype_name
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    weight_map, pending, generator = {}, {}, torch.Generator().manual_seed(0)

    def flush():
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(pending, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, file))
        pending.clear()

    for name, shape in shapes.items():
        # Uniform, as normal numbers take far longer to draw.
        pending[name] = ((torch.rand(shape, generator=generator) - 0.5) * 0.05).to(dtype)
        if sum(tensor.nbytes for tensor in pending.values()) > shard_bytes:
            flush()
    if pending:
        flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_adapter(full: Path, directory: Path, targets: list[str] | str, rank: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoConfig, LlamaForCausalLM

    from fedlpp_hf.tensors.adapters import adapter_parameters

    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = LlamaForCausalLM(AutoConfig.from_pretrained(full))
    peft_model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {k: torch.randn(t.shape, generator=generator) * 0.01 for k, t in adapter_parameters(peft_model).items()}
    lora.save_pretrained(directory)
    save_file(tensors, directory / "adapter_model.safetensors")


class MemoryPeak:
    """The peaks of this process's anonymous and resident memory, in MB, sampled."""

    def __enter__(self):
        self.start, self.peak, self._stop = self.read(), self.read(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _sample(self):
        while not self._stop.wait(0.01):
            self.peak = tuple(map(max, self.peak, self.read()))

    @staticmethod
    def read() -> tuple[float, float]:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(status[key].split()[0]) / 1e3 for key in ("RssAnon", "VmRSS"))  # type: ignore[return-value]


def take_free_memory(size: int) -> None:
    """Take memory and give it back, so that every method finds it the same.

    A virtual machine may hand its host what has been free for some seconds. To have it again may cost a second per GB, for a method
    with long imports before it, and nothing for one that follows the removal of the last result at once.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    length = min(2 * size, int(status["MemFree"].split()[0]) * 1024 // 2)
    mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def run_method(method: str, full: Path, adapter: Path, out: Path, threads: int, sync: bool) -> dict[str, float]:
    """One merge in this process, timed without the imports."""
    import torch

    torch.set_num_threads(threads)
    if method == "peft":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        def merge():
            model = AutoModelForCausalLM.from_pretrained(full, dtype="auto")
            PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)

    elif method == "stream":
        from fedlpp_hf.tensors.adapters import read_adapter
        from fedlpp_hf.tensors.lora import lora_factors

        def merge():
            from safetensors import safe_open
            from safetensors.torch import save_file

            tensors, config = read_adapter(adapter)
            factors = lora_factors(tensors, config)
            shutil.copytree(full, out, ignore=shutil.ignore_patterns("*.safetensors"))
            for shard in sorted(full.glob("*.safetensors")):
                merged = {}
                with safe_open(shard, "pt") as source:
                    for name in source.keys():  # noqa: SIM118 (a safe_open is no dict)
                        weight, found = source.get_tensor(name), factors.get(name.removesuffix(".weight"))
                        if found:
                            delta = tensors[found.key_b] @ tensors[found.key_a] * found.scale
                            weight = (weight.float() + delta).to(weight.dtype)
                        merged[name] = weight
                save_file(merged, out / shard.name, metadata={"format": "pt"})

    elif method == "ours":
        from fedlpp_hf.merge.merge import merge_adapter

        def merge():
            merge_adapter(full, adapter, out, threads=threads, sync=sync)

    else:

        def merge():
            out.mkdir()
            for path in full.iterdir():
                size = path.stat().st_size
                with open(path, "rb") as source, open(out / path.name, "wb") as destination:
                    while size > 0:
                        size -= os.copy_file_range(source.fileno(), destination.fileno(), size)
                    if sync:
                        os.fsync(destination.fileno())

    take_free_memory(sum(path.stat().st_size for path in full.iterdir()))
    with MemoryPeak() as memory:
        began, busy = time.perf_counter(), time.process_time()
        merge()
        seconds, cpu = time.perf_counter() - began, time.process_time() - busy
    return {
        "seconds": seconds,
        "cpu": cpu,
        "anonymous": memory.peak[0],
        "resident": memory.peak[1],
        "grown": memory.peak[0] - memory.start[0],
    }


def measure(methods: list[str], full: Path, adapter: Path, scratch: Path, args: argparse.Namespace) -> None:
    """Print one table: every method in turn, `repeats` times, against the floor."""
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for repeat in range(args.repeats):
        start = repeat % len(methods)  # whoever comes first may pay for the page cache's room
        for method in methods[start:] + methods[:start]:
            for path in full.glob("*.safetensors"):  # into the page cache
                with open(path, "rb", buffering=0) as file:
                    while file.read(1 << 24):
                        pass
            out = scratch / "out"
            command = [sys.executable, "-m", "benchmarks.merge", "--run", method, str(full), str(adapter), str(out)]
            flags = ["--threads", str(args.threads)] + ["--sync"] * args.sync
            printed = subprocess.run(command + flags, check=True, capture_output=True, text=True).stdout
            runs[method].append(json.loads(printed.splitlines()[-1]))
            shutil.rmtree(out)
    print("| method | seconds | × floor | × CPU of floor | anonymous MB | above imports | resident MB |")
    print("|---|---|---|---|---|---|---|")
    for method, found in runs.items():
        cells = [f"{statistics.median(run['seconds'] for run in found):.2f}"]
        for key in ("seconds", "cpu"):
            ratios = [run[key] / floor[key] for run, floor in zip(found, runs["floor"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
            if key == "seconds" and len(ratios) > 1:
                low, _, high = statistics.quantiles(ratios, method="inclusive")
                cells[-1] += f" ({low:.2f} to {high:.2f})"
        cells += [f"{max(run[key] for run in found):.0f}" for key in ("anonymous", "grown", "resident")]
        print(f"| {method} | " + " | ".join(cells) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--targets", nargs="+", default=["qv", "all-linear"], choices=["qv", "all-linear"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--shard_gigabytes", type=float, default=0.5)
    parser.add_argument(
        "--sync", action="store_true", help="have ours and the floor wait for the disk, as ours does by default"
    )
    parser.add_argument("--scratch", help="directory on the file system to measure; a temporary one by default")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        method, *paths = args.run
        print(json.dumps(run_method(method, *map(Path, paths), args.threads, args.sync)))
        return
    methods = ["floor", *(m for m in args.methods if m != "floor")]
    for gigabytes in args.gigabytes:
        for dtype in args.dtypes:
            with tempfile.TemporaryDirectory(dir=args.scratch, prefix="merge-benchmark-") as directory:
                scratch = Path(directory)
                write_model(scratch / "full", gigabytes, dtype, int(args.shard_gigabytes * 1e9))
                for targets in args.targets:
                    modules = ["q_proj", "v_proj"] if targets == "qv" else "all-linear"
                    write_adapter(scratch / "full", scratch / targets, modules, args.rank)
                    print(f"{gigabytes:g} GB, {dtype}, {targets}, {args.threads} threads, {args.repeats} repeats")
                    measure(methods, scratch / "full", scratch / targets, scratch, args)


if __name__ == "__main__":
    main()
