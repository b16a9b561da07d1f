# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""All benchmarks in one command; their results as JSON, and docs/performance.md made of it.

    python -m benchmarks.run [--full] [--only round_overhead merge] [--document docs/performance.md]

Each runs in its own process, one after the other, with nothing else on the machine, please. Where a benchmark can't run
(an extra is not installed) the page says so. Results of those that are left out by `--only` are kept.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Benchmark:
    """A module of this package, its arguments in the quick and in the full run, and what to read its output for."""

    name: str
    title: str
    text: str
    quick: tuple[str, ...] = ()
    full: tuple[str, ...] | None = None


BENCHMARKS = (
    Benchmark(
        "startup",
        "Before anything begins",
        "In fresh processes, in seconds of the processor (the clock says more where the machine has other work). Aim: 1.05 × what a "
        "script with a Trainer and PEFT imports anyway; 0.3 s for a wrong argument, `inspect` and `status`. Arguments, paths, headers "
        "and configurations are checked before torch is imported. Two cases take longer: a class of models that transformers does not "
        "have is known only after transformers is there; and options of the federation, after `advise`, `server` and `client`, are those of "
        "the trainer's own classes, so a mistyped one takes as long as their import. What merges or quantizes imports PEFT, and "
        "with it transformers and bitsandbytes, which PEFT imports at its top.",
        ("--repeats", "3"),
        ("--repeats", "30"),
    ),
    Benchmark(
        "round_overhead",
        "A client's round",
        "Aim: 1.10 × a bare PyTorch loop at one step, 1.02 × at twenty. The loop has the same batches, collation, clipping, optimizer "
        "and schedule, and ends in the same bits. A plain Trainer for each client spends most of its time in one `gc.collect()` of "
        "accelerate, which `train()` here avoids by `gc.freeze()`.",
        ("--repeats", "9"),
        ("--repeats", "45"),
    ),
    Benchmark(
        "gpu",
        "A client's run on a language model",
        "SmolLM2-135M (`make quickstart-lm` puts it there), rank 8 in all Linears, ten steps of 8 rows of 80 tokens, beside a QLoRA loop of "
        "one's own; aim: 1.02. And what must be equal to the bit. The same command measures a GPU.",
        ("--model", "out/smollm2", "--repeats", "5"),
    ),
    Benchmark(
        "round_parts",
        "Where a round's milliseconds go",
        "The same round and loop without the model's own work, sampled. In each step a Trainer walks all modules of the model, to set "
        "their mode and to clear gradients; a client's run clips the adapter alone. What is left in a step is accelerate's optimizer "
        "around the optimizer, one more parameter group, and the Trainer's batches and loss; in a round it is the guard (which loads "
        "the proxy, takes Δ and checks the version of each frozen parameter), and what wraps the model.",
        ("--seconds", "6"),
        ("--seconds", "30"),
    ),
    Benchmark(
        "client_workers",
        "Clients side by side",
        "`client_workers=N` shares a round's clients among processes, the largest first. The result is the same for any number of "
        "them; only threads may change the order of sums. Aim: 1.8 × one process on two cores. That is what they gain over one thread; "
        "over one process that uses both cores they can't gain more than it leaves idle.",
        ("--rounds", "3"),
        ("--rounds", "6"),
    ),
    Benchmark(
        "owner_ahead",
        "The owner beside the clients",
        "What the control variate costs a round when the owner's runs come after the clients', and when they run at the same time, "
        "as they do over a network, and in a simulation that leaves cores free. The evaluation of the server's model needs the "
        "round's updates, and is waited for; the report says how long.",
        ("--rounds", "3"),
        ("--rounds", "9"),
    ),
    Benchmark(
        "audit_parts",
        "The audit beside the run",
        "The quickstart (`make quickstart` makes what it needs) on one thread, in seconds of the processor; the run is all of `train()` but "
        "the audit. Aim: 0.5 × the run, which is out of reach with these figures: the attackers' training alone takes more. Two coalitions "
        "train at two rates for 24 steps, 96 in all beside the 120 of all clients, and no two of these steps are the same: their rows or their "
        "adapters differ, but for the first step at both rates, one in 48. Stops at half are taken from the whole run; equal adapters are "
        "trained, measured and evaluated once; rows are measured in batches by length. The metrics of the best attackers are the "
        "trainer's own, in its order: a language model's loss, and a metric of one's own, may depend on what a batch holds. Not built: attackers "
        "side by side in processes, which on two cores could gain what clients do there (Clients side by side), less the processes' start.",
    ),
    Benchmark(
        "many_clients",
        "Very many clients",
        "Updates are checked as they come and kept in files; the mean reads them again. What grows with the number of "
        "clients is their datasets (indices into one table) and the round's record.",
        ("--clients", "1000", "--rounds", "2"),
        ("--clients", "10000", "--rounds", "3", "--plot", "docs/many_clients.png"),
    ),
    Benchmark(
        "aggregation",
        "The mean of updates",
        "Aim: 1.5 × reading the files, and memory of three adapters. Sums are in double precision, client by client in a fixed order. "
        "The aim is out of reach of torch's operations for bfloat16: a value is read in half the time, and is still widened to eight bytes "
        "and added, which takes longer than to read it (the benchmark prints both). To map the files, other sizes of chunks, or fewer calls of "
        "Python gained nothing; one pass would need a compiled kernel.",
        ("--clients", "12", "--layers", "8", "--repeats", "5"),
        ("--clients", "12", "100", "--repeats", "5"),
    ),
    Benchmark(
        "export",
        "Export of a base, and the proxy",
        "Aim: 100 M parameters a second on two cores; the proxy of a 40 M-parameter adapter in less than a second.",
        ("--bits", "4", "3", "2", "--repeats", "3"),
        ("--repeats", "5"),
    ),
    Benchmark("wire_bytes", "Bytes on the wire", "From the messages themselves, per client and round."),
    Benchmark(
        "merge",
        "The merge",
        "The floor is a `copy_file_range` of the same files; on a disk that writes behind it varies more than what is measured. "
        "Aim: 1.5 × for q and v, 2 × for all Linears, and four times as fast as PEFT. [merge.md](merge.md#numbers) says where the rest goes.",
        ("--gigabytes", "0.5", "--dtypes", "bfloat16", "--repeats", "3"),
        ("--gigabytes", "1", "3", "10", "--repeats", "5"),
    ),
    Benchmark(
        "flower",
        "Over Flower",
        "On this machine's loopback, over TLS with node keys; aim: training and at most 3.5 s a round. Intervals and processes of Flower "
        "that made it 6.7 to 11 s on one busy core, and 7 s of the processor, are no longer in it: "
        "[deployment.md](deployment.md#what-a-round-costs-over-training). What is left are some 55 requests, of 5 to 10 ms of the "
        "processor each in Flower's servers and clients. By the times of all requests in one run with a median of 1.05 s a round "
        "(2026-11-29, one core of two, load 4):\n\n"
        "| in a round (medians) | seconds | what takes them |\n"
        "|---|---|---|\n"
        "| a node hears of its task and fetches it | 0.19 | Flower's requests |\n"
        "| a ClientApp is forked and fetches the task from its SuperNode | 0.13 | Flower's requests |\n"
        "| the app is loaded, the trainer asked, two steps trained | 0.08 | ours |\n"
        "| the ClientApp hands over its answer and ends, and the SuperNode sees it | 0.07 | Flower's requests; a pause of up to 0.05 s |\n"
        "| the node sends its answer | 0.15 | Flower's requests |\n"
        "| the server fetches both answers, averages, commits and sends the next tasks | 0.30 | Flower's requests; a pause of up to "
        "0.1 s; 0.04 s of ours |",
    ),
    Benchmark(
        "peers",
        "Simulators side by side",
        "Federations of clients that do nothing. Peers need separate environments: set `FLOWER_PYTHON` and "
        "`NVFLARE_PYTHON` to their interpreters.",
        ("--clients", "10", "--rounds", "3", "--limit", "120"),
        ("--clients", "100", "--rounds", "4", "--limit", "900"),
    ),
)


CHOICES = (
    "## What to choose",
    "",
    "| to save | set | see |",
    "|---|---|---|",
    "| time, with several cores or GPUs | `client_workers` | Clients side by side |",
    "| bytes up | `update_bits: 4`, and `update_density` | Bytes on the wire |",
    "| bytes down | fewer `adapter_bits`; `broadcast: never` sends no adapter | Bytes on the wire |",
    "| bytes of the base, sent once | fewer `base_bits`, `fedlpp-hf quantize --double_quant` | Bytes on the wire |",
    "| disk while merging a model from the Hub | `fedlpp-hf merge --delete_source_shards` | The merge |",
    "| time per round over a network | nothing: half a second to a second is Flower's; take fewer, longer rounds | Over Flower |",
)


def describe_machine() -> dict[str, str]:
    model = "unknown"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    packages = {}
    for name in ("torch", "transformers", "accelerate", "peft", "bitsandbytes"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return {
        "processor": f"{os.cpu_count()} cores of {model}",
        "memory": f"{memory:.0f} GB",
        "system": f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {number}" for name, number in packages.items()),
    }


def run_benchmark(benchmark: Benchmark, full: bool) -> dict[str, object]:
    arguments = benchmark.full if full and benchmark.full is not None else benchmark.quick
    command = ["-m", f"benchmarks.{benchmark.name}", *arguments]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    output = done.stdout.strip()
    if done.returncode:
        output = f"It did not run here: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    return {
        "command": " ".join(["python", *command]),
        "seconds": round(time.perf_counter() - began),
        "date": time.strftime("%Y-%m-%d"),
        "processor": describe_machine()["processor"],
        "load": round(os.getloadavg()[0], 1),
        "failed": bool(done.returncode),
        "output": output,
    }


def write_document(path: Path, results: dict) -> None:
    machine = results["machine"]
    lines = [
        "# Performance",
        "",
        "Made by `make bench`; do not edit. Ratios are of medians within one run, against the named reference.",
        "",
        *CHOICES,
        "",
        *(f"- {name}: {value}" for name, value in machine.items()),
    ]
    for benchmark in BENCHMARKS:
        found = results["benchmarks"].get(benchmark.name)
        if found is None:
            continue
        table = found["output"].lstrip().startswith("|") or "\n|" in found["output"]
        fence = [] if table else ["```"]
        lines += [
            "",
            f"## {benchmark.title}",
            "",
            benchmark.text,
            "",
            # What `--only` left out may be of another machine with as many cores.
            f"`{found['command']}`, {found['date']}, {found['processor']}, {found['seconds']} s:",
            "",
            *fence,
            found["output"],
            *fence,
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--full", action="store_true", help="larger and longer: an hour or two")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--results", type=Path, help="benchmarks/results/<machine>.json by default")
    parser.add_argument("--document", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    path = options.results or Path("benchmarks/results") / f"{platform.machine()}-{os.cpu_count()}-cores.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"benchmarks": {}}
    results["machine"] = describe_machine()
    path.parent.mkdir(parents=True, exist_ok=True)
    for benchmark in BENCHMARKS:
        if benchmark.name in options.only:
            print(f"\n{benchmark.title}", flush=True)
            results["benchmarks"][benchmark.name] = found = run_benchmark(benchmark, options.full)
            print(found["output"], flush=True)
            path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_document(options.document, results)
    print(f"\nResults are in {path}, the page is {options.document}.")


if __name__ == "__main__":
    main()
