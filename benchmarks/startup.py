# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What imports and commands cost before they do anything: seconds of the processor, and which packages are loaded.

    python -m benchmarks.startup --repeats 10

Each measurement is a fresh process; those of one round run one after the other, so that what else the machine does meets all of them.
Prints medians of user and system time, as ratios of pairs where a reference is named. The clock of a machine with other work
would say less.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.helpers import SMALL_MODELS, make_federation, make_llama_adapter


PACKAGES = (
    "numpy", "torch", "transformers", "accelerate", "peft", "datasets", "bitsandbytes", "scipy", "pandas", "huggingface_hub",
    "cryptography", "flwr",
)  # fmt: skip
IMPORTS = {
    "Trainer and peft": "from transformers import Trainer; import peft",
    "FederatedTrainer": "from fedlpp_hf import FederatedTrainer",
}
# Names of `make_places` stand for their paths.
COMMANDS = (
    "--help", "inspect absent", "inspect empty", "inspect base", "inspect adapter", "inspect out", "status out", "status empty",
    "stop out", "audit out", "trace base --key absent.json", "trace empty --key marks.json", "quantize empty new", "quantize base new",
    "quantize full new --model_class Llama", "merge full empty new", "merge base adapter new",
    "merge full adapter new --base_dir empty", "push base org/model", "advise empty rows.csv new", "advise full absent.csv new",
    "server --config absent.yaml", "client --config absent.yaml --data rows.csv", "quantize full new", "merge full adapter new",
    "push adapter org/model",
)  # fmt: skip
# Runs a command, and writes which packages were loaded to the file that is its first argument.
_PROBE = f"""
import atexit, sys
from pathlib import Path
atexit.register(lambda file=Path(sys.argv.pop(1)): file.write_text(" ".join(n for n in {PACKAGES} if n in sys.modules)))
from fedlpp_hf.cli.main import main
main(sys.argv[1:])
"""


def make_places(root: Path) -> dict[str, str]:
    """A full model, its base, an adapter, a federation and a key of marks, and an empty directory."""
    from fedlpp_hf import export_base
    from fedlpp_hf.base.mark_keys import MarkKey

    make_model, config = SMALL_MODELS["llama"]
    make_model(config).save_pretrained(root / "full")
    export_base(root / "full", root / "base")
    make_llama_adapter(root / "full", root / "adapter", 0)
    make_federation(root / "out", root / "adapter")
    (root / "empty").mkdir()
    (root / "rows.csv").touch()
    MarkKey("ab" * 32, str(root / "full"), {"bits": 4}).write(root / "marks.json")
    return {path.name: str(path) for path in root.iterdir()} | {"new": str(root / "new")}


def measure(command: Sequence[str]) -> tuple[float, int]:
    """Seconds of the processor of a process and its children, and its exit code."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, process.returncode


def compare_imports(repeats: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(repeats):
        for name, code in IMPORTS.items():
            seconds[name].append(measure([sys.executable, "-c", code])[0])
    floor = next(iter(IMPORTS))
    print(f"| import | seconds of the processor | × {floor} (quartiles) |\n|---|---|---|")
    for name, taken in seconds.items():
        low, middle, high = statistics.quantiles(
            [one / reference for one, reference in zip(taken, seconds[floor], strict=True)], n=4
        )
        print(f"| {name} | {statistics.median(taken):.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |", flush=True)


def list_commands(root: Path, repeats: int) -> None:
    places = make_places(root)
    found: dict[str, list[tuple[float, int]]] = {line: [] for line in COMMANDS}
    loaded: dict[str, str] = {}
    for _ in range(repeats):
        for line in COMMANDS:
            arguments = [places.get(word, word) for word in line.split()]
            found[line].append(measure([sys.executable, "-c", _PROBE, str(root / "loaded"), *arguments]))
            loaded[line] = (root / "loaded").read_text()
            if Path(places["new"]).exists():
                subprocess.run(["rm", "-r", places["new"]], check=True)
    print("\n| command | exit code | seconds of the processor | loads |\n|---|---|---|---|")
    for line, taken in found.items():
        seconds = statistics.median(one[0] for one in taken)
        print(f"| `{line}` | {taken[0][1]} | {seconds:.2f} | {loaded[line]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=10, help="of the imports; commands take a third")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    compare_imports(options.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        list_commands(Path(scratch), max(1, options.repeats // 3))


if __name__ == "__main__":
    main()
