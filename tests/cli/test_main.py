# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The parser and its errors: one line that says what is wrong, before anything heavy is imported."""

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedlpp_hf import __version__
from fedlpp_hf.base.mark_keys import MarkKey
from fedlpp_hf.cli import inspect
from fedlpp_hf.cli.main import COMMANDS, build_parser
from fedlpp_hf.tensors.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.helpers import assert_fails_in_one_line, make_federation


def test_every_command_has_help_with_examples(run):
    code, out, _ = run("--help")
    assert code == 0
    assert {"quantize", "inspect", "merge", "push"} <= set(COMMANDS)
    assert COMMANDS[0] == "merge"  # the command that people without a federation look for
    for command in COMMANDS:
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0 and f"examples:\n  fedlpp-hf {command}" in text


def test_version(run):
    assert run("--version") == (0, f"fedlpp-hf {__version__}\n", "")


WRONG_ARGUMENTS = [
    ([], "required: COMMAND"),
    (["inspekt"], "invalid choice: 'inspekt'"),
    (["inspekt"], "did you mean `inspect`? See"),
    (["--versoin"], "unrecognized arguments: --versoin; did you mean `--version`?"),
    (["inspect"], "required: directory. See `fedlpp-hf inspect --help`"),
    (["inspect", "base", "--xyz"], "unrecognized arguments: --xyz. See `fedlpp-hf inspect --help`"),
    (["inspect", "base", "--tensor"], "unrecognized arguments: --tensor; did you mean `--tensors`? See"),
    (["inspect", "--tensor"], "did you mean `--tensors`?"),
    (["merge", "full", "a", "out", "--weigths", "1", "2"], "did you mean `--weights`?"),
    (["push", "a", "org/b", "--creat-pr"], "did you mean `--create_pr`?"),
    (["server", "--confg", "x"], "unrecognized arguments: --confg; did you mean `--config`?"),
    (["client", "--config", "x", "--dta=y"], "unrecognized arguments: --dta; did you mean `--data`?"),
    (["server", "--config", "x", "--port", "65536"], "argument --port: '65536' is not a port"),
    (["audit", "out", "--threshold", "nan"], "argument --threshold: 'nan' is not a finite number"),
    (["quantize", "a", "b", "--bits", "tenary"], "did you mean `ternary`?"),
    (["quantize", "a", "b", "--block_size", "48"], "'48' is not a block size; expected one of 32, 64"),
    (["quantize", "a", "b", "--bits", "8", "--double_quant"], "with --bits 8 there are none"),
    (["quantize", "../absent", "b"], "`../absent` is neither a directory nor a name"),
    (["quantize", "a", "/"], "`/` exists; pass --overwrite"),
    (["push", "/", "not a name"], "`not a name` is no name of a repository"),
    (["push", "/", "org/model", "--audit", "absent.md"], "--audit `absent.md` is not a file"),
    (["push", "/", "org/model", "--federation_dir", "absent"], "`absent` is not a directory"),
    (["merge", "full", "a", "out", "--weights", "-1"], "argument --weights: '-1' is not a finite number"),
    (["merge", "full", "a", "b", "out", "--weights", "0", "0"], "--weights are all zero"),
    (["merge", "full", "./absent", "out"], "`./absent` is neither a directory nor a name"),
    (["merge", "full", "a", "/"], "`/` exists and is not an empty directory"),
    (["merge", "full", "a", "out", "--push", "org/a/b"], "`org/a/b` is no name of a repository"),
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
    (["merge", "full", "a", "out", "--base_weight", "0.5"], "give --base_dir"),
    (["merge", "full", "a", "out", "--base_weight", "2"], "expected a number from 0 to 1"),
    (["advise", "./absent", "rows.csv", "out"], "`./absent` is neither a directory nor a name"),
    (["advise", "full", "rows.csv", "out", "--base_bits", "3"], "--base_bits is not for all presets"),
    (["advise", "full", "rows.csv", "out", "--preset", "ours"], "--preset ours: expected NAME=FILE.yaml"),
    (["advise", "full", "rows.csv", "out", "--preset", "a=absent.yaml"], "--preset `absent.yaml` is not a file"),
    (["merge", "full", "a", "out", "--threads", "0"], "'0' is not a whole number of at least 1"),
]


@pytest.mark.parametrize("arguments, text", WRONG_ARGUMENTS)
def test_wrong_arguments_end_in_one_line(run, arguments, text):
    assert_fails_in_one_line(run(*arguments), text)


def test_wrong_arguments_are_noticed_before_heavy_imports():
    code = _RUN.format([(arguments, 2) for arguments, _ in WRONG_ARGUMENTS])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == len(WRONG_ARGUMENTS)


@pytest.fixture(scope="module")
def places(tmp_path_factory, full_llama, llama_base, adapters) -> dict[str, str]:
    """Directories and files by what they are: good ones, and some that are not what a command wants."""
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    (root / "federation.yaml").write_text("trainer: absent.py:make_trainer")
    (root / "rows.jsonl").touch()
    cut = Path(shutil.copytree(adapters[0], root / "cut"))
    with open(cut / ADAPTER_WEIGHTS, "r+b") as file:
        file.truncate(100)
    MarkKey("ab" * 32, str(root / "empty"), {"bits": 4}).write(root / "marks.json")
    make_federation(root / "out", adapters[0])
    names = {path.stem: str(path) for path in root.iterdir()}
    return names | {
        "full": str(full_llama),
        "base": str(llama_base),
        "adapter": str(adapters[0]),
        "new": str(root / "new"),
    }


# Paths that exist, and are not what the command needs; the names are those of `places`.
WRONG_PLACES = [
    ("inspect empty", "is not a base"),
    ("inspect full --verify", "is not a base; --verify"),
    ("inspect cut", "can't be read"),
    ("inspect cut --json", "can't be read"),
    ("audit out", "has no audit.json"),
    ("status empty", "holds no federation"),
    ("stop out", "No process runs a federation"),
    ("quantize empty new", "has neither `model.safetensors` nor"),
    ("quantize base new", "is quantized already"),
    ("quantize full new --mark a --key rows", "can't be read"),
    ("merge full empty new", "has no `adapter_config.json`"),
    ("merge full cut new", "can't be read"),
    ("merge empty adapter new", "has neither `model.safetensors` nor"),
    ("merge base adapter new", "is quantized already"),
    ("merge full adapter new --base_dir empty", "has no `base_manifest.json`"),
    ("trace base --key rows", "can't be read"),
    ("trace empty --key marks", "has neither `model.safetensors` nor"),
    ("trace base --key marks", "has neither `model.safetensors` nor"),
    ("push base org/model", "must not be published"),
    ("push empty org/model", "expected a merged model"),
    ("push adapter org/model --federation_dir out", "is an adapter; --federation_dir is for"),
    ("push full org/model --source ./absent", "is neither a directory nor"),
    ("advise empty rows new", "has neither `model.safetensors` nor"),
    ("advise full absent.csv new", "data `absent.csv` is not a file"),
    ("advise full rows new --only strickt", "There is no preset `strickt`"),
    ("server --config federation", "trainer='absent.py:make_trainer'"),
    ("client --config federation --data absent.jsonl", "--data `absent.jsonl` does not exist"),
    ("client --config federation --data rows --dry_run --num_rounds 3", "trainer='absent.py:make_trainer'"),
]
RIGHT_PLACES = ["inspect base", "inspect adapter --tensors", "inspect adapter --json", "inspect out", "inspect out --json", "status out"]  # fmt: skip
# Imports the command, runs it, and says what it imported.
_RUN = """
import sys
from fedlpp_hf.cli.main import main
for arguments, code in {}:
    try:
        main(arguments)
        assert code == 0, arguments
    except SystemExit as end:
        assert end.code == code, arguments
    heavy = {{"torch", "transformers", "peft", "datasets", "bitsandbytes", "huggingface_hub", "flwr"}} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""


@pytest.mark.parametrize("arguments, text", WRONG_PLACES)
def test_wrong_places_end_in_one_line(run, places, monkeypatch, arguments, text):
    monkeypatch.chdir(Path(places["empty"]).parent)
    if arguments.startswith(("server", "client")):
        pytest.importorskip("flwr", reason="needs the extra [flower]")
    assert_fails_in_one_line(run(*(places.get(word, word) for word in arguments.split())), text)
    assert not Path(places["new"]).exists()


def test_places_are_checked_and_inspected_before_heavy_imports(places, tmp_path):
    """What is on disk is checked by its headers: neither a wrong path nor `inspect` and `status` wait for torch."""
    network = importlib.util.find_spec("flwr") is not None
    wrong = [(line, 2) for line, _ in WRONG_PLACES if network or not line.startswith(("server", "client"))]
    lines = [*wrong, *((line, 0) for line in RIGHT_PLACES)]
    cases = [([places.get(word, word) for word in line.split()], code) for line, code in lines]
    result = subprocess.run(
        [sys.executable, "-c", _RUN.format(cases)], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == len(wrong)


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


@pytest.mark.parametrize("arguments", [["--traceback", "inspect", "absent"], ["inspect", "absent", "--traceback"]])
def test_traceback_is_shown_on_demand(run, arguments):
    with pytest.raises(ValueError, match="is not a directory"):
        run(*arguments)


def test_errors_speak_of_options(run, replace_inspect):
    def fail(_):
        raise ValueError("`a/tensors/b` exists; tensors=True and verify=False need `tensors`, as does other=1.")

    replace_inspect(fail)
    told = "`a/tensors/b` exists; --tensors and no --verify need --tensors, as does other=1."
    assert_fails_in_one_line(run("inspect", "x"), told)


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


@pytest.mark.parametrize(
    "module, extra",
    [("cryptography.x509", "flower"), ("matplotlib", "demo"), ("sklearn.metrics", "demo"), ("trl", "trl")],
)
def test_missing_extra_is_named(run, replace_inspect, module, extra):
    def fail(_):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    replace_inspect(fail)
    assert_fails_in_one_line(
        run("inspect", "x"), f"which is not installed: pip install 'fedlpp_hf[{extra}] @ git+https://"
    )


def test_missing_module_that_no_extra_brings_is_a_bug(run, replace_inspect):
    def fail(_):
        raise ModuleNotFoundError("No module named 'fedlpp_hf.absent'", name="fedlpp_hf.absent")

    replace_inspect(fail)
    with pytest.raises(ModuleNotFoundError):
        run("inspect", "x")


@pytest.mark.parametrize("module", ["flwr", "cryptography", "packaging"])
@pytest.mark.parametrize("command", ["server", "client"])
def test_commands_without_their_extra_say_which(tmp_path, command, module):
    """As a user meets it: a module can't be imported, and whatever needs it first ends in one line."""
    config, rows = tmp_path / "federation.yaml", tmp_path / "rows.jsonl"
    config.write_text("trainer: task.py:make_trainer")
    rows.touch()
    arguments = [command, "--config", str(config), *(["--data", str(rows)] if command == "client" else [])]
    code = f"""
import sys
sys.modules[{module!r}] = None
import importlib.metadata as metadata
version = metadata.version
def find(name):
    if name == {module!r}:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = find
from fedlpp_hf.cli import main
main.main({arguments})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "pip install 'fedlpp_hf[flower] @ git+https://" in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1


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
