# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf audit`: show the privacy audit of a federation."""

import argparse

from .arguments import add_json, check_directory, parse_share, print_json
from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `audit`."""
    parser.add_argument("directory", help="the output_dir of a federation that ran with --audit True")
    parser.add_argument(
        "--threshold", type=parse_share, help="largest stolen value that passes (default: the run's own)"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print [`~fedlpp_hf.AuditReport`], then check its threshold."""
    check_directory(arguments.directory)
    from dataclasses import asdict, replace

    from ..audit.report import AuditReport, render_audit

    report = AuditReport.read(arguments.directory)
    if arguments.threshold is not None:
        report = replace(report, threshold=arguments.threshold)
    if arguments.json:
        print_json(asdict(report))
    else:
        print(render_audit(report), end="")
    report.check_threshold()


COMMAND = Command(
    summary="Show the model-privacy audit of a federation, or fail if it exceeds a threshold",
    examples="  fedlpp-hf audit out/                      what attackers recovered, alone and together\n"
    "  fedlpp-hf audit out/ --threshold 0.1      exit code 2 if more than a tenth of the owner's gain was stolen\n"
    "To repeat an audit, run the federation's script with --audit True --resume_from_checkpoint True.",
    add_arguments=add_arguments,
    run=run,
)
