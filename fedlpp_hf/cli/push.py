# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf push`: upload a merged model or an adapter to the Hub."""

import argparse
import os

from .arguments import (
    add_json,
    add_visibility,
    check_directory,
    check_file,
    check_full_model,
    check_repo_id,
    print_json,
)
from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `push`."""
    parser.add_argument("directory", help="a merged model; for the adapter, the output_dir of a federation")
    parser.add_argument("repo_id", help="repository; created as private if it does not exist")
    parser.add_argument("--source", help="the full model; its card's licence and tags are kept")
    parser.add_argument("--federation_dir", help="output_dir of the federation, for the card of a merged model")
    parser.add_argument("--audit", help="Markdown or JSON of a privacy audit, for the card")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    add_visibility(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Call [`~fedlpp_hf.hub.push.push_adapter`] for an adapter, else [`~fedlpp_hf.hub.push.push_merged`]."""
    check_directory(arguments.directory)
    check_repo_id(arguments.repo_id)
    if arguments.federation_dir is not None:
        check_directory(arguments.federation_dir)
    if arguments.audit is not None:
        check_file("--audit", arguments.audit)
    if arguments.source is not None:
        check_full_model(arguments.source)
    from ..tensors.names import ADAPTER_CONFIG

    is_adapter = os.path.isfile(os.path.join(arguments.directory, ADAPTER_CONFIG))
    if is_adapter and arguments.federation_dir is not None:
        raise ValueError(
            f"`{arguments.directory}` is an adapter; --federation_dir is for a merged model. Leave it out."
        )
    if not is_adapter:
        from ..hub.merged_model import check_merged

        check_merged(arguments.directory)
    from ..hub.push import push_adapter, push_merged

    options = {
        "source": arguments.source,
        "private": not arguments.public,
        "allow_public": arguments.allow_public,
        "revision": arguments.revision,
        "create_pr": arguments.create_pr,
        "audit": arguments.audit,
    }
    if is_adapter:
        commit = push_adapter(arguments.directory, arguments.repo_id, **options)
    else:
        options["federation_dir"] = arguments.federation_dir
        commit = push_merged(arguments.directory, arguments.repo_id, **options)
    if arguments.json:
        print_json({"repo_id": arguments.repo_id, "commit_url": commit.commit_url})
    else:
        print(f"Pushed to {commit.commit_url}")


COMMAND = Command(
    summary="Upload a merged model or the server's adapter to the Hub",
    examples="  fedlpp-hf push merged/ org/merged --source org/full-model --federation_dir out/\n"
    "  fedlpp-hf push out/ org/adapter",
    add_arguments=add_arguments,
    run=run,
)
