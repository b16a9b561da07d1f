# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf client`: take part in a federation over a network."""

import argparse
import sys

from .arguments import check_file, parse_count
from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `client`."""
    parser.add_argument("--config", required=True, help="YAML file of the federation")
    parser.add_argument("--data", required=True, help="rows: .jsonl, .csv, .parquet, or a dataset's directory")
    parser.add_argument("--server", default="127.0.0.1:8000", help="HOST:PORT of the server (default 127.0.0.1:8000)")
    parser.add_argument("--certificate", help="the server's ca.crt")
    parser.add_argument("--client_id", help="name in the federation (default: the name of the file of rows)")
    parser.add_argument("--state_dir", help="directory for the node's key and logs (default: flower-CLIENT_ID)")
    parser.add_argument(
        "--cache_dir",
        default="~/.cache/fedlpp_hf/bases",
        help="directory for bases (default ~/.cache/fedlpp_hf/bases)",
    )
    parser.add_argument("--base", help="directory or Hub id of the base; otherwise the server sends it")
    parser.add_argument(
        "--processes", type=parse_count, default=1, help="number of GPUs to train on, by accelerate launch (default 1)"
    )
    parser.add_argument(
        "--peer_keys",
        help="directory with the node.pub of every client, named by its id, from elsewhere than the server: under "
        "secure_aggregation the server can then invent no clients",
    )
    parser.add_argument("--cold", action="store_true", help="keep no trainer running: load everything for each task")
    parser.add_argument(
        "--policy", help="YAML file of this client's own conditions, which stand whatever the server says"
    )
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="train one task, show what would leave, send nothing, and end",
    )
    parser.add_argument("--insecure", action="store_true", help="no TLS and no node key; on loopback only")
    parser.add_argument(
        "--trust_local_users",
        action="store_true",
        help="let all users of this machine use Flower's local port; each of them can then run code as you",
    )


def run(arguments: argparse.Namespace) -> None:
    """Call [`~fedlpp_hf.flower.client_command.run_client`]."""
    from ..flower.environment import check_flower

    check_flower()  # first: the next import needs packages that only Flower brings
    from ..flower.addresses import parse_server
    from ..flower.client_command import run_client
    from ..flower.settings_check import check_settings

    check_file("--config", arguments.config)
    parse_server(arguments.server)
    if arguments.policy:
        check_file("--policy", arguments.policy)
    # The file is the federation's, which the server has checked; a flag and the policy are this client's own.
    if arguments.flags or arguments.policy:
        check_settings(arguments.config, arguments.flags, list(arguments.parser.list_options()), arguments.policy)
    code = run_client(
        arguments.config,
        arguments.data,
        arguments.flags,
        server=arguments.server,
        certificate=arguments.certificate,
        client_id=arguments.client_id,
        state_dir=arguments.state_dir,
        cache_dir=arguments.cache_dir,
        base=arguments.base,
        processes=arguments.processes,
        cold=arguments.cold,
        policy=arguments.policy,
        dry_run=arguments.dry_run,
        insecure=arguments.insecure,
        peer_keys=arguments.peer_keys,
        trust_local_users=arguments.trust_local_users,
    )
    sys.exit(code)


COMMAND = Command(
    summary="Take part in a federation over a network; the rows stay on this machine",
    examples="  fedlpp-hf client --config federation.yaml --data rows.jsonl --server fl.example.org:8000 --certificate ca.crt\n\n"
    "All other flags override the configuration.",
    add_arguments=add_arguments,
    run=run,
    takes_flags=True,
)
