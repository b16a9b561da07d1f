# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The parser and its errors: one line that says what is wrong, before anything heavy is imported."""

import subprocess
import sys
from dataclasses import replace

import pytest

from fedlpp_hf import __version__
from fedlpp_hf.cli import inspect
from fedlpp_hf.cli.main import COMMANDS, build_parser
from fedlpp_hf.tensors.adapters import ADAPTER_CONFIG
from tests.helpers import assert_fails_in_one_line


def test_every_command_has_help_with_examples(run):
    code, out, _ = run("--help")
    assert code == 0
    assert {"quantize", "inspect", "merge", "push"} <= set(COMMANDS)
    for command in COMMANDS:
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0 and f"examples:\n  fedlpp-hf {command}" in text


def test_version(run):
    assert run("--version") == (0, f"fedlpp-hf {__version__}\n", "")


WRONG_ARGUMENTS = [
    ([], "required: COMMAND"),
    (["inspekt"], "invalid choice: 'inspekt'"),
    (["inspect"], "required: directory. See `fedlpp-hf inspect --help`"),
    (["inspect", "base", "--tensor"], "unrecognized arguments: --tensor. See `fedlpp-hf inspect --help`"),
    (["inspect", "absent"], "`absent` is not a directory"),
    (["audit", "absent"], "`absent` is not a directory"),
    (["push", "absent", "org/model"], "`absent` is not a directory"),
    (["quantize", "a", "b", "--bits", "5"], "argument --bits: invalid choice: '5'"),
    (["quantize", "a", "b", "--embedding_bits", "16"], "argument --embedding_bits: invalid choice: '16'"),
    (["quantize", "a", "b", "--block_size", "many"], "'many' is not a whole number of at least 1"),
    (["quantize", "a", "b", "--max_shard_size", "huge"], "'huge' is not a size"),
    (["merge", "full", "adapter"], "required: output_dir"),
    (["merge", "full", "adapter", "out", "--public"], "give --push REPO_ID"),
    (["merge", "full", "a", "b", "out", "--weights", "1"], "1 weights for 2 adapters"),
    (["merge", "full", "a", "out", "--target", "base"], "give --base_dir"),
    (["merge", "full", "a", "out", "--threads", "0"], "'0' is not a whole number of at least 1"),
]


@pytest.mark.parametrize("arguments, text", WRONG_ARGUMENTS)
def test_wrong_arguments_end_in_one_line(run, arguments, text):
    assert_fails_in_one_line(run(*arguments), text)


def test_wrong_arguments_are_noticed_before_heavy_imports():
    code = f"""
import sys
from fedlpp_hf.cli.main import main
for arguments in {[arguments for arguments, _ in WRONG_ARGUMENTS]}:
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 2, arguments
    heavy = {{"torch", "transformers", "peft", "datasets", "bitsandbytes", "flwr"}} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == len(WRONG_ARGUMENTS)


def test_wrong_input_ends_in_one_line(run, tmp_path, full_llama, llama_base):
    assert_fails_in_one_line(
        run("quantize", tmp_path / "absent", tmp_path / "base"), "absent` is neither a directory nor"
    )
    assert_fails_in_one_line(run("quantize", llama_base, tmp_path / "base"), "is quantized already")
    assert_fails_in_one_line(run("quantize", full_llama, llama_base), "exists")
    assert_fails_in_one_line(
        run("quantize", full_llama, tmp_path / "base", "--model_class", "Llama"), "no model class `Llama`"
    )
    assert_fails_in_one_line(run("merge", full_llama, tmp_path, tmp_path / "merged"), ADAPTER_CONFIG)
    assert_fails_in_one_line(run("merge", full_llama, full_llama, full_llama), "exists and is not an empty directory")
    assert_fails_in_one_line(run("inspect", tmp_path), "is not a base")
    assert_fails_in_one_line(run("inspect", full_llama, "--verify"), "is not a base; --verify")
    assert list(tmp_path.iterdir()) == []


def test_traceback_is_shown_on_demand(run):
    with pytest.raises(ValueError, match="is not a directory"):
        run("--traceback", "inspect", "absent")


@pytest.fixture
def replace_inspect(monkeypatch):
    """Let `fedlpp-hf inspect` do something else."""
    return lambda run: monkeypatch.setattr(inspect, "COMMAND", replace(inspect.COMMAND, run=run))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("two\n  lines")])
def test_errors_of_the_system_end_in_one_line(run, replace_inspect, error):
    def fail(_):
        raise error

    replace_inspect(fail)
    assert_fails_in_one_line(run("inspect", "x"), " ".join(str(error).split()))


def test_interrupt_ends_with_130(run, replace_inspect):
    def interrupt(_):
        raise KeyboardInterrupt

    replace_inspect(interrupt)
    assert run("inspect", "x") == (130, "", "fedlpp-hf: interrupted\n")


def test_bug_is_not_reported_as_a_users_error(run, replace_inspect):
    replace_inspect(lambda _: {}["no such key"])
    with pytest.raises(KeyError):
        run("inspect", "x")


def test_closed_pipe_is_no_error():
    talk = (
        "import dataclasses; from fedlpp_hf.cli import inspect, main; "
        "inspect.COMMAND = dataclasses.replace(inspect.COMMAND, run=lambda _: print('x' * 10**6)); "
        "main.main(['inspect', 'x'])"
    )
    command = f"'{sys.executable}' -c \"{talk}\" | head -c 3; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert (result.stdout, result.stderr) == ("xxx0\n", "")


@pytest.mark.parametrize("size, count", [("1000", 1000), ("2GB", 2 * 10**9), ("1.5 mb", 1_500_000), ("3k", 3000)])
def test_sizes_are_read_with_their_units(size, count):
    options = build_parser().parse_args(["quantize", "full", "base", "--max_shard_size", size])
    assert options.max_shard_size == count
