# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf advise`: simulate presets on the owner's own rows, before any partner is asked."""

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .arguments import add_json, check_file, check_readable_model, parse_count, parse_share, print_json
from .command import Command


_FILES = (".json", ".jsonl", ".csv", ".parquet")  # as in `fedlpp_hf.trainer.advice_rows`, whose import loads datasets
_ROLES = ("text", "label", "prompt", "completion", "messages")
# Options of the federation that are no flags here.
_DECIDED = {
    "num_rounds", "max_steps", "num_train_epochs", "base_bits", "adapter_bits", "broadcast", "base_weights", "update_scales", "control_variate",
    "control_variate_runs", "output_dir", "resume_from_checkpoint", "overwrite", "audit", "audit_steps", "audit_rows",
    "audit_threshold", "compare_full_precision", "push_to_hub", "save_total_limit", "config", "merge", "report_to", "disable_tqdm",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `advise`."""
    parser.add_argument("full_model", help="directory or Hub id of the owner's full-precision model")
    parser.add_argument("data", help="the owner's rows: a file, a directory of save_to_disk, or a name on the Hub")
    parser.add_argument("output_dir", help="directory for advice.md, advice.json, advice.png and the runs")
    parser.add_argument("--split", default="train", help="split of the data, if there are several (default train)")
    parser.add_argument("--data_config", help="configuration of a dataset on the Hub")
    for role in _ROLES:
        parser.add_argument(f"--{role}_column", help=f"column with the {role} (default `{role}`)")
    parser.add_argument(
        "--separator", default="\n", help="what stands between prompt and completion (default: new line)"
    )
    parser.add_argument("--max_length", type=parse_count, default=128, help="tokens of a row (default 128)")
    parser.add_argument("--rows", type=parse_count, default=2000, help="most rows to use (default 2000)")
    parser.add_argument(
        "--steps", type=parse_count, default=24, help="local steps of each client, and of each attacker (default 24)"
    )
    parser.add_argument("--lora_r", type=parse_count, default=8, help="rank of the adapter (default 8)")
    parser.add_argument(
        "--target_modules", nargs="+", default=["all-linear"], help="layers that get an adapter (default all-linear)"
    )
    parser.add_argument(
        "--max_stolen", type=parse_share, default=0.1, help="largest stolen value to recommend (default 0.1)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="presets to run (default: all of fedlpp, fedlpp-variate, light, balanced, strict)",
    )
    parser.add_argument(
        "--preset",
        action="append",
        default=[],
        metavar="NAME=FILE.yaml",
        help="one more preset: options of the federation",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Call [`~fedlpp_hf.trainer.advice.simulate`], and print the table and the recommendation."""
    check_readable_model(arguments.full_model)
    files = dict(_parse_preset(text) for text in arguments.preset)
    _check_flags(arguments.flags)
    if not os.path.exists(arguments.data) and arguments.data.endswith(_FILES):
        check_file("data", arguments.data)
    from ..config.presets import choose_presets

    presets = choose_presets(arguments.only, files)
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from ..trainer.advice import Simulation, simulate
    from ..trainer.advice_results import ADVICE_JSON, ADVICE_PICTURE, ADVICE_TABLE
    from ..trainer.advice_rows import RowSource

    disable_progress_bars()
    disable_progress_bar()
    source = RowSource(
        arguments.data,
        arguments.split,
        arguments.data_config,
        {role: name for role in _ROLES if (name := getattr(arguments, f"{role}_column")) is not None},
        arguments.separator,
        arguments.max_length,
        arguments.rows,
    )
    targets = arguments.target_modules
    lora = {
        "r": arguments.lora_r,
        "lora_alpha": 2 * arguments.lora_r,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
    }
    simulation = Simulation.prepare(
        arguments.full_model, source, arguments.flags, arguments.steps, lora, Path(arguments.output_dir)
    )
    simulate(simulation, presets, arguments.max_stolen, show=not arguments.json)
    if arguments.json:
        print_json(json.loads((simulation.output_dir / ADVICE_JSON).read_text(encoding="utf-8")))
        return
    print((simulation.output_dir / ADVICE_TABLE).read_text(encoding="utf-8"))
    picture = simulation.output_dir / ADVICE_PICTURE
    print(f"Picture: {picture}" if picture.is_file() else "No picture: it needs matplotlib (fedlpp_hf[demo]).")


def _parse_preset(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not re.fullmatch(r"\w[\w.-]{0,63}", name):
        raise ValueError(
            f"--preset {text}: expected NAME=FILE.yaml, with a name of letters, digits, `-`, `_` and `.`."
        )
    check_file("--preset", path)
    return name, path


def _check_flags(flags: Sequence[str]) -> None:
    """Refuse what presets differ in, or a simulation decides, and what is no option at all."""
    for flag in flags:
        name = flag[2:].partition("=")[0]
        if flag.startswith("--") and name in _DECIDED:
            raise ValueError(
                f"--{name} is not for all presets: they differ in it, or the simulation sets it. Use --steps for the length of the "
                "training, and --preset NAME=FILE.yaml for a preset of your own."
            )


COMMAND = Command(
    summary="Simulate presets on the owner's own rows, and recommend one, before any partner is asked",
    examples="  fedlpp-hf advise out/owner own.jsonl out/advice                            text and label, or prompt and completion\n"
    "  fedlpp-hf advise models/full own.csv out/advice --prompt_column act --completion_column text\n"
    "  fedlpp-hf advise models/full own.csv out/advice --partition hospital       clients as they will be\n"
    "  fedlpp-hf advise models/full own.csv out/advice --preset ours=ours.yaml    and a preset of your own\n\n"
    "The same command goes on where it was stopped. All other flags are options of the federation, for all presets.",
    add_arguments=add_arguments,
    run=run,
    takes_flags=True,
)
