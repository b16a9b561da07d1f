# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf merge`: merge adapters into the full-precision model, and push the result on demand."""

import argparse
import os
from pathlib import Path

from .arguments import (
    add_json,
    add_visibility,
    check_directory,
    check_full_model,
    check_readable_model,
    check_repo_id,
    find_model_class,
    parse_count,
    parse_share,
    print_json,
)
from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merge`."""
    parser.add_argument("full_model", help="directory or Hub id of the full-precision model")
    parser.add_argument("adapter", nargs="+", help="directories or Hub ids of PEFT adapters")
    parser.add_argument("output_dir", help="directory for the merged model")
    parser.add_argument("--weights", nargs="+", type=parse_share, help="weight of each adapter (default: equal)")
    parser.add_argument("--base_dir", help="the quantized base Q(W); reports its distance from the full model W")
    parser.add_argument(
        "--base_weight",
        type=parse_share,
        help="from 0 (merge into W) to 1 (merge into Q(W) of --base_dir); default: as the adapter's federation chose",
    )
    parser.add_argument("--verify", action="store_true", help="read the result back and compare every byte")
    parser.add_argument(
        "--delete_source_shards",
        action="store_true",
        help="delete each shard downloaded from the Hub once it is merged",
    )
    parser.add_argument("--model_class", help="class of transformers on which the adapter was trained")
    parser.add_argument(
        "--threads", type=parse_count, help="threads to read, multiply and write (default: one per core)"
    )
    parser.add_argument("--device", default="cpu", help="device for the products (default cpu)")
    parser.add_argument("--no_sync", action="store_true", help="do not wait until the result is on disk")
    parser.add_argument("--revision", help="branch, tag or commit of the full model on the Hub")
    parser.add_argument("--layers", action="store_true", help="list the update of every layer")
    parser.add_argument("--push", metavar="REPO_ID", help="upload the result to this repository")
    add_visibility(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Call [`~fedlpp_hf.merge_adapter`], print what it did, and push the result with `--push`."""
    _check_arguments(arguments)
    base_dir, base_weight = _find_base(arguments)
    model_class = find_model_class(arguments.model_class)
    from ..merge.merge import merge_adapter
    from ..report.inspection import describe_merge

    report = merge_adapter(
        arguments.full_model,
        arguments.adapter,
        arguments.output_dir,
        weights=arguments.weights,
        base_dir=base_dir,
        base_weight=base_weight,
        verify=arguments.verify,
        delete_source_shards=arguments.delete_source_shards,
        model_class=model_class,
        threads=arguments.threads,
        device=arguments.device,
        sync=not arguments.no_sync,
        revision=arguments.revision,
    )
    if not arguments.json:
        print("\n".join(describe_merge(report, arguments.layers)), flush=True)
    commit_url = _push(arguments) if arguments.push else None
    if arguments.json:
        print_json(report.to_dict() | {"commit_url": commit_url})
    elif commit_url:
        print(f"Pushed to {commit_url}")


def _check_arguments(arguments: argparse.Namespace) -> None:
    if (arguments.public or arguments.allow_public) and not arguments.push:
        raise ValueError("--public and --allow_public are options of the push; give --push REPO_ID too.")
    if arguments.weights is not None and len(arguments.weights) != len(arguments.adapter):
        raise ValueError(
            f"{len(arguments.weights)} weights for {len(arguments.adapter)} adapters; give --weights one number per adapter."
        )
    if arguments.weights is not None and not any(arguments.weights):
        raise ValueError("--weights are all zero; expected at least one number above zero.")
    if (arguments.base_weight or 0) > 1:
        raise ValueError(f"--base_weight {arguments.base_weight:g}: expected a number from 0 to 1.")
    if arguments.base_weight and arguments.base_dir is None:
        raise ValueError("--base_weight moves towards the base; give --base_dir, the directory of the base.")
    for path in (arguments.full_model, *arguments.adapter):
        check_full_model(path)
    if arguments.push is not None:
        check_repo_id(arguments.push)
    from ..merge.destination import check_destination

    check_destination(Path(arguments.output_dir), arguments.full_model)
    _check_files(arguments)


def _check_files(arguments: argparse.Namespace) -> None:
    """Read the headers of what is on disk: a wrong path must not wait for torch and PEFT."""
    from ..base.manifest import read_manifest
    from ..tensors.lora import read_config, read_shapes

    for path in filter(os.path.isdir, arguments.adapter):
        read_config(path)
        read_shapes(path)
    check_readable_model(arguments.full_model)
    if arguments.base_dir is not None:
        check_directory(arguments.base_dir)
        read_manifest(arguments.base_dir)


def _find_base(arguments: argparse.Namespace) -> tuple[str | None, float]:
    """The base and its weight: as given, or as the federation of the adapter chose."""
    if arguments.base_weight is not None or len(arguments.adapter) > 1:
        return arguments.base_dir, arguments.base_weight or 0.0
    from ..server.best import read_base_weight
    from ..server.store import RoundStore

    store = RoundStore(arguments.adapter[0])
    weight = read_base_weight(store) if store.exists else 0.0
    if not weight or arguments.base_dir is not None:
        return arguments.base_dir, weight
    base_dir = store.root / "base"
    if not base_dir.is_dir():
        raise ValueError(
            f"The federation of `{arguments.adapter[0]}` merges into W − {weight:g}·E, and its base is not beside it. Give "
            "--base_dir, or --base_weight 0 to merge into W all the same."
        )
    return str(base_dir), weight


def _push(arguments: argparse.Namespace) -> str:
    from ..hub.push import push_merged
    from ..server.store import RoundStore

    federation = next((path for path in arguments.adapter if RoundStore(path).exists), None)
    commit = push_merged(
        arguments.output_dir,
        arguments.push,
        source=arguments.full_model,
        federation_dir=federation,
        private=not arguments.public,
        allow_public=arguments.allow_public,
    )
    return commit.commit_url


COMMAND = Command(
    summary="Merge adapters into the full-precision model, shard by shard",
    examples="  fedlpp-hf merge org/full-model out/ merged/ --verify\n"
    "  fedlpp-hf merge org/full-model out/ merged/ --push org/merged    private; with a card from the federation\n"
    "  fedlpp-hf merge models/full a/ b/ c/ merged/ --weights 3 1 1     the exact mean of their products B·A\n"
    "  fedlpp-hf merge models/full out/ merged/ --base_dir base/        measure W - Q(W) against the update\n"
    "  fedlpp-hf merge models/full out/ merged/ --base_dir base/ --base_weight 0.5    halfway between W and Q(W)",
    add_arguments=add_arguments,
    run=run,
)
