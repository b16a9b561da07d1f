# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf server`: run a federation over a network."""

import argparse
import sys

from .arguments import check_file, parse_port
from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `server`."""
    parser.add_argument("--config", required=True, help="YAML file of the federation")
    parser.add_argument(
        "--state_dir",
        default="flower-server",
        help="directory for certificates, logs and the SuperLink's database (default flower-server)",
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1); 0.0.0.0, or :: for IPv6, for other machines",
    )
    parser.add_argument(
        "--port", type=parse_port, default=8000, help="the one port that clients connect to (default 8000)"
    )
    parser.add_argument(
        "--hosts", nargs="+", default=[], help="names and addresses of this machine that clients connect to"
    )
    parser.add_argument(
        "--client_keys", help="directory with the clients' public keys, each named after its client's id: ID.pub"
    )
    parser.add_argument("--insecure", action="store_true", help="no TLS and no node keys; on loopback only")
    parser.add_argument(
        "--trust_local_users",
        action="store_true",
        help="let all users of this machine use Flower's local port; each of them can then run code as you",
    )


def run(arguments: argparse.Namespace) -> None:
    """Call [`~fedlpp_hf.flower.server_command.run_server`]."""
    from ..flower.environment import check_flower

    check_flower()  # first: the next import needs packages that only Flower brings
    from ..flower.server_command import read_addresses, run_server
    from ..flower.settings_check import check_settings

    check_file("--config", arguments.config)
    read_addresses(arguments.listen, arguments.port, arguments.hosts, arguments.insecure)
    check_settings(arguments.config, arguments.flags, list(arguments.parser.list_options()))
    code = run_server(
        arguments.config,
        arguments.flags,
        state_dir=arguments.state_dir,
        listen=arguments.listen,
        port=arguments.port,
        hosts=arguments.hosts,
        client_keys=arguments.client_keys,
        insecure=arguments.insecure,
        trust_local_users=arguments.trust_local_users,
    )
    sys.exit(code)


COMMAND = Command(
    summary="Run a federation over a network, as its owner",
    examples="  fedlpp-hf server --config federation.yaml --full_model models/full --listen 0.0.0.0 \\\n"
    "      --hosts fl.example.org --client_keys keys/\n"
    "  fedlpp-hf server --config federation.yaml --full_model models/full --resume_from_checkpoint true\n\n"
    "All other flags override the configuration.",
    add_arguments=add_arguments,
    run=run,
    takes_flags=True,
)
