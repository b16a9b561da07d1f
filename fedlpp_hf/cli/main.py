# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The command `fedlpp-hf`: each subcommand is a function of the library with its arguments.

A subcommand is one function that adds its parser, and one that runs it. What it needs is imported when it runs, so that
`--help` does not wait for torch.
"""

import argparse
import os
import re
import sys
from typing import Any, NoReturn


_EPILOG = "`fedlpp-hf COMMAND --help` has the options and examples of each command."
_SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand; errors of the user's input end in one line and exit code 2, ^C in exit code 130."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    known, flags = parser.parse_known_args([_underscored(argument) for argument in argv])
    arguments = vars(known)
    if "flags" in arguments:  # of the federation's configuration, which has its own parser
        arguments["flags"] = flags
    elif flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    run, show_traceback = arguments.pop("run"), arguments.pop("traceback")
    try:
        run(**arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _end(130, "interrupted")
    except BrokenPipeError:  # `| head` has seen enough; the interpreter's own flush must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, RuntimeError, OSError) as error:
        if show_traceback:
            raise
        _end(2, f"error: {' '.join(str(error).split())}")


def _end(code: int, message: str) -> NoReturn:
    print(f"fedlpp-hf: {message}", file=sys.stderr)
    sys.exit(code)


def _underscored(argument: str) -> str:
    """`--base-dir` as `--base_dir`: both are understood, as by transformers' own parsers."""
    option, equals, value = argument.partition("=")
    return option.replace("-", "_").replace("__", "--", 1) + equals + value if argument.startswith("--") else argument


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any):
        # An abbreviation that is clear today is another option's tomorrow.
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        _end(2, f"error: {message}. See `{self.prog} --help`.")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command with all its subcommands."""
    parser = _Parser(prog="fedlpp-hf", description="Federated LoRA on a quantized base.", epilog=_EPILOG)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_quantize(commands)
    _add_inspect(commands)
    _add_audit(commands)
    _add_merge(commands)
    _add_push(commands)
    _add_server(commands)
    _add_client(commands)
    return parser


def _add_command(commands: Any, name: str, run: Any, summary: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary}.", epilog=f"examples:\n{examples}")
    parser.set_defaults(run=run)
    return parser


def _add_quantize(commands: Any) -> None:
    parser = _add_command(
        commands,
        "quantize",
        run_quantize,
        "Export the quantized base that clients hold from the owner's full model",
        "  fedlpp-hf quantize org/full-model base/                 4 bits, embeddings too\n"
        "  fedlpp-hf quantize models/full base/ --bits 2           2 bits of information on stock 4-bit kernels\n"
        "  fedlpp-hf quantize models/full base/ --bits ternary --block_size 128 --overwrite",
    )
    parser.add_argument("full_model", help="directory or Hub id of the full-precision model")
    parser.add_argument("output_dir", help="directory of the base, which plain from_pretrained loads")
    parser.add_argument("--bits", default=4, help="of the weights: 4 (default), 3, 2, 1 or ternary, 8")
    parser.add_argument("--block_size", type=int, default=64, help="weights that share one scale (default 64)")
    parser.add_argument("--double_quant", action="store_true", help="quantize the scales, too (QLoRA)")
    parser.add_argument(
        "--embedding_bits", default=4, help="of embeddings and heads (default 4); 32 gives them away in full precision"
    )
    parser.add_argument(
        "--skip_modules", nargs="+", help="modules that stay floats (default: output embeddings and task heads)"
    )
    parser.add_argument("--model_class", help="class of transformers (default: the one that the configuration names)")
    parser.add_argument("--revision", help="of the full model on the Hub")
    parser.add_argument("--max_shard_size", type=_parse_size, default="2GB", help="of the base's files (default 2GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace a base that is there already")


def run_quantize(output_dir: str, model_class: str | None, **options: Any) -> None:
    """`fedlpp-hf quantize`: [`~fedlpp_hf.export_base`], then what is in the base."""
    from ..base.export import export_base
    from ..report.inspection import describe_base

    export_base(output_dir=output_dir, model_class=_find_class(model_class), **options)
    print("\n".join(describe_base(output_dir)))


def _add_inspect(commands: Any) -> None:
    parser = _add_command(
        commands,
        "inspect",
        run_inspect,
        "Show what is in a base, an adapter or a federation, and how much of it leaves",
        "  fedlpp-hf inspect base/ --verify       a base: what travels, what of it in full precision; check every file\n"
        "  fedlpp-hf inspect adapter/ --tensors   an adapter: every tensor; the bytes of a broadcast at 1 to 32 bits\n"
        "  fedlpp-hf inspect out/                 a federation: its rounds",
    )
    parser.add_argument("directory", help="a base, an adapter, or the output_dir of a federation")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--verify", action="store_true", help="of a base: compare every file with its manifest")


def run_inspect(directory: str, tensors: bool, verify: bool) -> None:
    """`fedlpp-hf inspect`: print what a directory holds."""
    from ..report.inspection import describe_directory

    print("\n".join(describe_directory(directory, tensors, verify)))


def _add_audit(commands: Any) -> None:
    parser = _add_command(
        commands,
        "audit",
        run_audit,
        "Show the model-privacy audit of a federation, or fail if it exceeds a threshold",
        "  fedlpp-hf audit out/                      what attackers got, alone and together\n"
        "  fedlpp-hf audit out/ --threshold 0.1      exit code 2 if more than a tenth of the owner's gain was stolen\n"
        "To audit anew, run the federation's script with --audit True --resume_from_checkpoint True.",
    )
    parser.add_argument("directory", help="the output_dir of a federation that was run with --audit True")
    parser.add_argument("--threshold", type=float, help="largest stolen value that passes (default: as in the run)")


def run_audit(directory: str, threshold: float | None) -> None:
    """`fedlpp-hf audit`: print [`~fedlpp_hf.AuditReport`], after checking that it is one, of this federation."""
    from dataclasses import replace

    from ..audit.report import AuditReport, render_audit

    report = AuditReport.read(directory)
    print(render_audit(report), end="")
    (report if threshold is None else replace(report, threshold=threshold)).check_threshold()


def _add_merge(commands: Any) -> None:
    parser = _add_command(
        commands,
        "merge",
        run_merge,
        "Merge adapters into the full-precision model, shard by shard",
        "  fedlpp-hf merge org/full-model out/ merged/ --verify\n"
        "  fedlpp-hf merge org/full-model out/ merged/ --push org/merged    private; with a card from the federation\n"
        "  fedlpp-hf merge models/full a/ b/ c/ merged/ --weights 3 1 1     the exact mean of their products B·A\n"
        "  fedlpp-hf merge models/full out/ merged/ --base_dir base/        measure W - Q(W) against the update",
    )
    parser.add_argument("full_model", help="directory or Hub id of the full-precision model")
    parser.add_argument("adapter", nargs="+", help="PEFT directories or Hub ids")
    parser.add_argument("output_dir", help="directory of the merged model")
    parser.add_argument("--weights", nargs="+", type=float, help="of the adapters (default: equal)")
    parser.add_argument(
        "--target", choices=("full", "base"), default="full", help="merge into W (default), or into Q(W) of --base_dir"
    )
    parser.add_argument("--base_dir", help="the quantized base, to report how far it is from the full model")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare all of it")
    parser.add_argument(
        "--delete_source_shards", action="store_true", help="of a model from the Hub, as soon as they are merged"
    )
    parser.add_argument("--model_class", help="class of transformers that the adapter was trained on")
    parser.add_argument("--threads", type=int, help="that read, multiply and write (default: one per core)")
    parser.add_argument("--device", default="cpu", help="that multiplies (default cpu)")
    parser.add_argument("--no_sync", action="store_true", help="do not wait until the result is on disk")
    parser.add_argument("--revision", help="of the full model on the Hub")
    parser.add_argument("--layers", action="store_true", help="list the update of every layer")
    parser.add_argument("--push", metavar="REPO_ID", help="upload the result to this repository")
    _add_privacy_of_push(parser)


def run_merge(
    full_model: str,
    adapter: list[str],
    output_dir: str,
    model_class: str | None,
    no_sync: bool,
    layers: bool,
    push: str | None,
    public: bool,
    allow_public: bool,
    **options: Any,
) -> None:
    """`fedlpp-hf merge`: [`~fedlpp_hf.merge_adapter`], then what it did, then [`~fedlpp_hf.hub.push_merged`]."""
    if public and not push:
        raise ValueError("--public says how to push; give --push REPO_ID, too.")
    from ..merge.merge import merge_adapter
    from ..report.inspection import describe_merge

    report = merge_adapter(
        full_model,
        adapter,
        output_dir,
        model_class=_find_class(model_class),
        sync=not no_sync,
        **options,
    )
    print("\n".join(describe_merge(report, layers)), flush=True)
    if push:
        from ..hub.push import push_merged
        from ..server.store import RoundStore

        federation = next((path for path in adapter if RoundStore(path).exists), None)
        commit = push_merged(
            output_dir,
            push,
            source=full_model,
            federation_dir=federation,
            private=not public,
            allow_public=allow_public,
        )
        print(f"Pushed to {commit.commit_url}")


def _add_push(commands: Any) -> None:
    parser = _add_command(
        commands,
        "push",
        run_push,
        "Upload a merged model, or the server's adapter, to the Hub",
        "  fedlpp-hf push merged/ org/merged --source org/full-model --federation_dir out/\n"
        "  fedlpp-hf push out/ org/adapter",
    )
    parser.add_argument("directory", help="a merged model, or the output_dir of a federation for its adapter")
    parser.add_argument("repo_id", help="repository; made, private, if it is not there")
    parser.add_argument("--source", help="the full model, whose card's licence and tags are kept")
    parser.add_argument("--federation_dir", help="output_dir of the federation, for the card of a merged model")
    parser.add_argument("--audit", help="Markdown or JSON of a privacy audit, for the card")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    _add_privacy_of_push(parser)


def _add_privacy_of_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--public", action="store_true", help="make the repository public, if it is made")
    parser.add_argument(
        "--allow_public", action="store_true", help="allow a public repository though the full model is not public"
    )


def run_push(directory: str, repo_id: str, federation_dir: str | None, public: bool, **options: Any) -> None:
    """`fedlpp-hf push`: [`~fedlpp_hf.hub.push_adapter`] of an adapter, else [`~fedlpp_hf.hub.push_merged`]."""
    from ..hub.push import push_adapter, push_merged
    from ..tensors.adapters import ADAPTER_CONFIG

    if os.path.isfile(os.path.join(directory, ADAPTER_CONFIG)):
        if federation_dir is not None:
            raise ValueError(f"`{directory}` is an adapter; --federation_dir is for a merged model. Leave it out.")
        commit = push_adapter(directory, repo_id, private=not public, **options)
    else:
        commit = push_merged(directory, repo_id, federation_dir=federation_dir, private=not public, **options)
    print(f"Pushed to {commit.commit_url}")


def _add_server(commands: Any) -> None:
    parser = _add_command(
        commands,
        "server",
        run_server,
        "Run a federation over a network, as its owner",
        "  fedlpp-hf server --config federation.yaml --full_model models/full --listen 0.0.0.0 \\\n"
        "      --hosts fl.example.org --client_keys keys/\n"
        "  fedlpp-hf server --config federation.yaml --full_model models/full --resume_from_checkpoint true\n\n"
        "All other flags override the configuration.",
    )
    parser.set_defaults(flags=None)
    parser.add_argument("--config", required=True, help="YAML file of the federation")
    parser.add_argument("--state_dir", default="flower-server", help="for certificates, logs and SuperLink's database")
    parser.add_argument("--listen", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=8000, help="the one port that clients reach")
    parser.add_argument(
        "--hosts", nargs="+", default=[], help="names and addresses by which clients call this machine"
    )
    parser.add_argument("--client_keys", help="directory with the *.pub files that clients sent")
    parser.add_argument("--insecure", action="store_true", help="no TLS and no node keys; on loopback only")


def run_server(**options: Any) -> None:
    """`fedlpp-hf server`: [`~fedlpp_hf.flower.deployment.run_server`]."""
    sys.exit(_import_deployment().run_server(**options))


def _add_client(commands: Any) -> None:
    parser = _add_command(
        commands,
        "client",
        run_client,
        "Take part in a federation over a network, with rows that stay here",
        "  fedlpp-hf client --config federation.yaml --data rows.jsonl --server fl.example.org:8000 --certificate ca.crt\n\n"
        "All other flags override the configuration.",
    )
    parser.set_defaults(flags=None)
    parser.add_argument("--config", required=True, help="YAML file of the federation")
    parser.add_argument("--data", required=True, help="rows: .jsonl, .csv, .parquet, or a dataset's directory")
    parser.add_argument("--server", default="127.0.0.1:8000", help="HOST:PORT")
    parser.add_argument("--certificate", help="the server's ca.crt")
    parser.add_argument("--client_id", help="name in the federation; by default that of the file of rows")
    parser.add_argument("--state_dir", help="for the node's key and logs; flower-CLIENT_ID by default")
    parser.add_argument("--cache_dir", default="~/.cache/fedlpp_hf/bases", help="where bases are kept")
    parser.add_argument("--base", help="directory or Hub id of the base, if it does not come from the server")
    parser.add_argument("--processes", type=int, default=1, help="GPUs to train on, through accelerate launch")
    parser.add_argument("--cold", action="store_true", help="no long-lived trainer: load everything for every task")
    parser.add_argument("--insecure", action="store_true", help="no TLS and no node key; on loopback only")


def run_client(**options: Any) -> None:
    """`fedlpp-hf client`: [`~fedlpp_hf.flower.deployment.run_client`]."""
    sys.exit(_import_deployment().run_client(**options))


def _import_deployment() -> Any:
    from ..flower.version import check_flower

    check_flower()  # first, because the other imports what only Flower brings
    from ..flower import deployment

    return deployment


def _find_class(name: str | None) -> Any:
    if name is None:
        return None
    import transformers

    found = getattr(transformers, name, None)
    if not hasattr(found, "from_pretrained"):
        raise ValueError(f"transformers has no model class `{name}`; expected one like AutoModelForCausalLM.")
    return found


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?)b?", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected bytes, or a number with kB, MB, GB or TB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


if __name__ == "__main__":
    main()
