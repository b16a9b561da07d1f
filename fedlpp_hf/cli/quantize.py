# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf quantize`: export the quantized base."""

import argparse
import os
from typing import Any

from .arguments import BITS, add_json, check_readable_model, find_model_class, parse_block_size, parse_size, print_json
from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `quantize`."""
    parser.add_argument("full_model", help="directory or Hub id of the full-precision model")
    parser.add_argument("output_dir", help="directory for the base, which plain from_pretrained loads")
    parser.add_argument("--bits", choices=BITS, default="4", help="bits per weight (default 4)")
    parser.add_argument(
        "--block_size", type=parse_block_size, default=64, help="weights that share one scale (default 64)"
    )
    parser.add_argument("--double_quant", action="store_true", help="quantize the scales too, as QLoRA does")
    parser.add_argument(
        "--embedding_bits",
        choices=(*BITS, "32"),
        default="4",
        help="bits per value of embeddings and heads (default 4); 32 gives them to clients in full precision",
    )
    parser.add_argument(
        "--skip_modules", nargs="+", help="modules to leave as floats (default: output embeddings and task heads)"
    )
    parser.add_argument("--model_class", help="class of transformers (default: the one named in the model's config)")
    parser.add_argument("--revision", help="branch, tag or commit of the full model on the Hub")
    parser.add_argument("--max_shard_size", type=parse_size, default="2GB", help="size of a file (default 2GB)")
    parser.add_argument(
        "--mark", metavar="CLIENT", help="mark this copy as the one for CLIENT, so that `trace` recognizes it"
    )
    parser.add_argument(
        "--key", metavar="FILE", help="with --mark: the owner's secret key; created if it does not exist"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing base")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Call [`~fedlpp_hf.export_base`] and print what the base contains."""
    if os.path.exists(arguments.output_dir) and not arguments.overwrite:
        raise ValueError(f"`{arguments.output_dir}` exists; pass --overwrite to replace the base in it.")
    if arguments.double_quant and arguments.bits == "8":
        raise ValueError("--double_quant compresses 4-bit scales; with --bits 8 there are none. Leave it out.")
    if (arguments.mark is None) != (arguments.key is None):
        raise ValueError("--mark CLIENT and --key FILE come together: whose copy it is, and the secret that marks it.")
    if arguments.mark is not None and arguments.bits == "8":
        raise ValueError("--mark with --bits 8: int8 rows have none of the levels that a mark needs. Use 1 to 4 bits.")
    check_readable_model(arguments.full_model)
    model_class, mark = find_model_class(arguments.model_class), _prepare_mark(arguments)
    from ..base.export import export_base
    from ..report.base_inspection import describe_base, summarize_base

    export_base(
        arguments.full_model,
        arguments.output_dir,
        bits=arguments.bits,
        block_size=arguments.block_size,
        double_quant=arguments.double_quant,
        embedding_bits=arguments.embedding_bits,
        skip_modules=arguments.skip_modules,
        model_class=model_class,
        revision=arguments.revision,
        overwrite=arguments.overwrite,
        mark=mark,
        max_shard_size=arguments.max_shard_size,
    )
    if arguments.json:
        print_json(summarize_base(arguments.output_dir))
    else:
        print("\n".join(describe_base(arguments.output_dir)))


def _prepare_mark(arguments: argparse.Namespace) -> Any:
    if arguments.mark is None:
        return None
    from ..base.mark_keys import prepare_mark
    from ..tensors.codebooks import check_bits

    settings = {
        "bits": check_bits(arguments.bits),
        "block_size": arguments.block_size,
        "skip_modules": arguments.skip_modules,
        "model_class": arguments.model_class,
    }
    return prepare_mark(arguments.key, arguments.mark, arguments.full_model, settings)


COMMAND = Command(
    summary="Export the quantized base for clients from the owner's full model",
    examples="  fedlpp-hf quantize org/full-model base/                 4 bits, embeddings too\n"
    "  fedlpp-hf quantize models/full base/ --bits 2           2 bits of information on stock 4-bit kernels\n"
    "  fedlpp-hf quantize models/full base/ --bits ternary --block_size 128 --overwrite\n"
    "  fedlpp-hf quantize models/full base-a/ --mark hospital-a --key marks.json    a copy that `trace` recognizes",
    add_arguments=add_arguments,
    run=run,
)
