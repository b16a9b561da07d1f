# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The command line does what the functions do, and says in one line what it can't."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedlpp_hf.base.manifest import read_manifest
from fedlpp_hf.cli import main as cli
from fedlpp_hf.hub import push as hub
from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.report.text import format_bytes
from fedlpp_hf.server.store import RoundStore
from fedlpp_hf.tensors.adapters import ADAPTER_CONFIG, adapter_parameters, copy_adapter, write_adapter
from fedlpp_hf.tensors.quantization import quantize


WEIGHTS = "model.safetensors"


@pytest.fixture
def run(capsys):
    """Run the command; returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        else:
            code = 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def adapters(full_llama, tmp_path_factory) -> list[Path]:
    """Two adapters on [`full_llama`] that are not zero."""
    directories = []
    for seed in (0, 1):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(full_llama), config)
        torch.manual_seed(seed)
        tensors = {key: torch.randn_like(value) / 10 for key, value in copy_adapter(adapter_parameters(model)).items()}
        directories.append(tmp_path_factory.mktemp("adapters") / f"adapter-{seed}")
        write_adapter(directories[-1], tensors, config)
    return directories


def check_error(result: tuple[int, str, str], text: str) -> None:
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("fedlpp-hf: ")]
    assert code == 2 and out == "" and len(lines) == 1
    assert lines[0].startswith("fedlpp-hf: error: ") and text in lines[0] and "Traceback" not in err


def test_every_command_has_help_with_examples(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("quantize", "inspect", "merge", "push"):
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0 and f"examples:\n  fedlpp-hf {command}" in text


@pytest.mark.parametrize(
    "arguments, text",
    [
        ([], "required: COMMAND"),
        (["inspekt"], "invalid choice: 'inspekt'"),
        (["inspect"], "required: directory. See `fedlpp-hf inspect --help`"),
        (["inspect", "base", "--tensor"], "unrecognized arguments: --tensor"),
        (["quantize", "a", "b", "--block_size", "many"], "invalid int value: 'many'"),
        (["quantize", "a", "b", "--max_shard_size", "huge"], "'huge' is no size"),
        (["merge", "full", "adapter"], "required: output_dir"),
    ],
)
def test_wrong_arguments_end_in_one_line(run, arguments, text):
    check_error(run(*arguments), text)


def test_wrong_input_ends_in_one_line(run, tmp_path, full_llama, llama_base):
    check_error(run("quantize", tmp_path / "absent", tmp_path / "base"), "absent` is neither a directory")
    check_error(run("quantize", full_llama, tmp_path / "base", "--bits", 5), "bits='5' has no codebook")
    check_error(run("quantize", llama_base, tmp_path / "base"), "is quantized already")
    check_error(run("quantize", full_llama, llama_base), "exists")
    check_error(run("quantize", full_llama, tmp_path / "base", "--model_class", "Llama"), "no model class `Llama`")
    check_error(run("merge", full_llama, tmp_path, tmp_path / "merged"), ADAPTER_CONFIG)
    check_error(run("merge", full_llama, full_llama, full_llama), "exists and is not an empty directory")
    check_error(run("inspect", tmp_path), "is no base")
    check_error(run("inspect", tmp_path / "absent"), "is no directory")
    check_error(run("inspect", full_llama, "--verify"), "is no base; --verify")
    assert list(tmp_path.iterdir()) == []


def test_traceback_is_shown_on_demand(run):
    with pytest.raises(ValueError, match="is no directory"):
        run("--traceback", "inspect", "absent")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("two\n  lines")])
def test_errors_of_the_system_end_in_one_line(run, monkeypatch, error):
    def fail(**_):
        raise error

    monkeypatch.setattr(cli, "run_inspect", fail)
    check_error(run("inspect", "x"), " ".join(str(error).split()))


def test_interrupt_ends_with_130(run, monkeypatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_inspect", interrupt)
    assert run("inspect", "x") == (130, "", "fedlpp-hf: interrupted\n")


def test_bug_is_not_dressed_up_as_a_users_error(run, monkeypatch):
    monkeypatch.setattr(cli, "run_inspect", lambda **_: {}["no such key"])
    with pytest.raises(KeyError):
        run("inspect", "x")


def test_closed_pipe_is_no_error():
    talk = "from fedlpp_hf.cli import main as cli; cli.run_inspect = lambda **_: print('x' * 10**6); cli.main(['inspect', 'x'])"
    command = f"'{sys.executable}' -c \"{talk}\" | head -c 3; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert (result.stdout, result.stderr) == ("xxx0\n", "")


@pytest.mark.parametrize("size, count", [("1000", 1000), ("2GB", 2 * 10**9), ("1.5 mb", 1_500_000), ("3k", 3000)])
def test_sizes_are_read_with_their_units(size, count):
    options = cli.build_parser().parse_args(["quantize", "full", "base", "--max_shard_size", size])
    assert options.max_shard_size == count


def test_quantize_makes_the_base_that_the_function_makes(run, full_llama, llama_base, tmp_path):
    code, out, _ = run("quantize", full_llama, tmp_path / "base", "--model-class", "AutoModelForCausalLM")
    assert code == 0
    manifest = read_manifest(tmp_path / "base")
    assert manifest["fingerprint"] == read_manifest(llama_base)["fingerprint"]
    assert f"Each client is sent at most {format_bytes(manifest['totals']['information_bytes'])} once" in out


def test_options_of_quantize_reach_the_base(run, full_llama, tmp_path):
    options = ["--bits", "ternary", "--block-size=128", "--embedding_bits", "2", "--skip_modules", "lm_head"]
    assert run("quantize", full_llama, tmp_path / "base", *options, "--max_shard_size", "20kB")[0] == 0
    manifest = read_manifest(tmp_path / "base")
    found = {key: manifest[key] for key in ("bits", "block_size", "embedding_bits", "double_quant", "skip_modules")}
    expected = {"bits": 1, "block_size": 128, "embedding_bits": 2, "double_quant": False, "skip_modules": ["lm_head"]}
    assert found == expected
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    assert run("quantize", full_llama, tmp_path / "base", "--double_quant", "--overwrite")[0] == 0
    assert read_manifest(tmp_path / "base")["double_quant"] is True


def read_table(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_inspect_base_accounts_for_every_tensor(run, llama_base):
    manifest = read_manifest(llama_base)
    code, out, _ = run("inspect", llama_base, "--tensors", "--verify")
    rows = read_table(out)
    assert code == 0 and len(rows) == 2 + len(manifest["tensors"]) + 1
    assert [row[0].split()[0] for row in rows[2:-1]] == [entry["name"] for entry in manifest["tensors"]]
    totals = manifest["totals"]
    assert rows[-1][2:5] == [
        f"{totals['parameters']:,}",
        f"{totals['information_bits_per_parameter']:.2f}",
        format_bytes(totals["information_bytes"]),
    ]
    assert manifest["fingerprint"] in out and "every file checked" in out
    exact = [entry["name"] for entry in manifest["tensors"] if entry["kind"] == "full_precision"]
    assert f"In full precision: {format_bytes(totals['full_precision_bytes'])}" in out and exact[0] in out
    summary = read_table(run("inspect", llama_base)[1])
    assert summary[-1] == rows[-1] and sum(int(row[1]) for row in summary[2:-1]) == len(manifest["tensors"])


def test_inspect_verifies_only_when_asked(run, full_llama, tmp_path):
    assert run("quantize", full_llama, tmp_path / "base")[0] == 0
    with open(tmp_path / "base" / WEIGHTS, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert run("inspect", tmp_path / "base")[0] == 0
    check_error(run("inspect", tmp_path / "base", "--verify"), "is not the exported file")


def test_inspect_adapter_says_what_a_broadcast_costs(run, adapters):
    code, out, _ = run("inspect", adapters[0], "--tensors")
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    header, sizes = read_table(out)[-3], read_table(out)[-1]
    assert code == 0 and header == ["bits", "1", "2", "3", "4", "8", "32"]
    for bits, size in zip(header[1:-1], sizes[1:-1], strict=True):
        assert size == format_bytes(sum(quantize(tensor, bits).nbytes for tensor in tensors.values()))
    assert sizes[-1] == format_bytes(4 * sum(tensor.numel() for tensor in tensors.values()))
    assert {row[0] for row in read_table(out)} >= set(tensors)
    assert "rank 4, alpha 8, 4 targets (scale 2)" in out and "WARNING" not in out


def test_inspect_warns_of_an_adapter_that_names_its_model(run, adapters, tmp_path):
    write_adapter(tmp_path, load_file(adapters[0] / "adapter_model.safetensors"), LoraConfig(r=4, lora_alpha=8))
    path = tmp_path / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "owner/secret"}))
    assert "WARNING: its configuration names the model `owner/secret`" in run("inspect", tmp_path)[1]
    path.write_text('{"peft_type": "LORA"}')
    check_error(run("inspect", tmp_path), "is no configuration of LoRA")
    path.write_text("{")
    check_error(run("inspect", tmp_path), "can't be read")


@pytest.fixture
def federation(tmp_path, adapters) -> RoundStore:
    store, config = RoundStore(tmp_path / "out"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    settings = {"num_rounds": 5, "base_bits": 3, "adapter_bits": 2, "broadcast": "every_round", "max_steps": -1}
    store.create(
        {"federation_id": "f0", "base_fingerprint": "ab" * 32, "clients": {"a": 3, "b": 1}, "config": settings}
    )
    adapter = load_file(adapters[0] / "adapter_model.safetensors")
    for number, (proxy, server) in enumerate([(0.4, 0.5), (0.8, 0.7)]):
        clients = {"a": {"num_examples": 3, "loss": 2.0}, "b": {"num_examples": 1, "loss": 4.0}} if number else {}
        record = {"round": number, "clients": clients, "rejected": {}, "seconds": 2.5 * number}
        record |= {"bytes_down": 2000 * number, "bytes_up": 3000 * number}
        record["metrics"] = {"proxy": {"eval_accuracy": proxy}, "server": {"eval_accuracy": server}}
        store.commit(number, adapter, config, {"window_rounds": torch.tensor(1)}, record)
    return store


def test_inspect_federation_shows_its_rounds(run, federation):
    code, out, _ = run("inspect", federation.output_dir)
    assert code == 0 and run("inspect", federation.root)[1] == out
    assert "Federation f0: 1 of 5 rounds committed, 2 clients" in out
    assert "base_bits=3, adapter_bits=2, broadcast=every_round\n" in out
    header, _, *rows = read_table(out)
    assert header[3:6] == ["clients' loss", "base + proxy accuracy", "server accuracy"]
    assert rows == [
        ["0", "0", "0", "", "0.4000", "0.5000", "0 B", "0 B", "0.0"],
        ["1", "2", "0", "2.5000", "0.8000", "0.7000", "2.0 kB", "3.0 kB", "2.5"],
    ]
    assert "WARNING: The clients' proxy (accuracy 0.8000) is better than the server's model" in out


def test_inspect_federation_with_its_published_adapter(run, federation, adapters):
    federation.publish(load_file(adapters[0] / "adapter_model.safetensors"), LoraConfig(r=4, lora_alpha=8))
    out = run("inspect", federation.output_dir)[1]
    assert "Federation f0" in out and "LORA adapter: rank 4" in out
    assert "LORA adapter" in run("inspect", federation.round_dir(1))[1]


def test_inspect_federation_that_has_no_round_yet(run, tmp_path):
    settings = {"federation_id": "f0", "base_fingerprint": "ab", "clients": {}, "config": {"num_rounds": 5}}
    RoundStore(tmp_path).create(settings)
    assert "No round is committed" in run("inspect", tmp_path)[1]


def test_inspect_damaged_federation_ends_in_one_line(run, federation):
    (federation.round_dir(0) / "round.json").write_text("{")
    check_error(run("inspect", federation.output_dir), "can't be read")


def test_merge_writes_what_the_function_writes(run, full_llama, adapters, llama_base, tmp_path):
    code, out, _ = run("merge", full_llama, adapters[0], tmp_path / "cli", "--verify", "--threads", 1)
    merge_adapter(full_llama, adapters[0], tmp_path / "function")
    assert code == 0 and "4 tensors updated, 0 replaced, 0 added (verified)" in out
    assert (tmp_path / "cli" / WEIGHTS).read_bytes() == (tmp_path / "function" / WEIGHTS).read_bytes()
    options = ["--base_dir", llama_base, "--layers", "--no_sync"]
    code, out, _ = run("merge", full_llama, adapters[0], tmp_path / "measured", *options)
    assert code == 0 and len(read_table(out)) == 2 + 4
    assert all(math.isfinite(float(cell)) for row in read_table(out)[2:] for cell in row[1:])
    assert (tmp_path / "measured" / WEIGHTS).read_bytes() == (tmp_path / "cli" / WEIGHTS).read_bytes()


def test_merge_takes_several_adapters_with_weights(run, full_llama, adapters, tmp_path):
    assert run("merge", full_llama, *adapters, tmp_path / "cli", "--weights", 3, 1)[0] == 0
    merge_adapter(full_llama, adapters, tmp_path / "function", weights=[3, 1])
    assert (tmp_path / "cli" / WEIGHTS).read_bytes() == (tmp_path / "function" / WEIGHTS).read_bytes()
    check_error(run("merge", full_llama, *adapters, tmp_path / "x", "--weights", 1), "1 weights for 2 adapters")


@pytest.fixture
def pushes(monkeypatch) -> list[tuple]:
    """Calls of the functions that would speak to the Hub, in place of them."""
    calls: list[tuple] = []

    def record(name):
        def push(*arguments, **options):
            calls.append((name, *arguments, options))
            return SimpleNamespace(commit_url="https://hub/commit")

        return push

    for name in ("push_merged", "push_adapter"):
        monkeypatch.setattr(hub, name, record(name))
    return calls


def test_merge_pushes_what_it_wrote(run, pushes, full_llama, federation, adapters, tmp_path):
    federation.publish(load_file(adapters[0] / "adapter_model.safetensors"), PeftConfig.from_pretrained(adapters[0]))
    arguments = ["merge", full_llama, federation.output_dir, tmp_path / "merged"]
    code, out, _ = run(*arguments, "--push", "org/merged")
    assert code == 0 and "Pushed to https://hub/commit" in out and (tmp_path / "merged" / WEIGHTS).is_file()
    options = {"source": str(full_llama), "federation_dir": str(federation.output_dir)}
    options |= {"private": True, "allow_public": False}
    assert pushes == [("push_merged", str(tmp_path / "merged"), "org/merged", options)]
    check_error(run(*arguments[:-1], tmp_path / "other", "--public"), "give --push REPO_ID")
    assert not (tmp_path / "other").exists()


def test_push_tells_an_adapter_from_a_merged_model(run, pushes, full_llama, adapters):
    assert run("push", adapters[0], "org/adapter", "--create-pr")[0] == 0
    assert run("push", full_llama, "org/merged", "--public", "--source", "org/full", "--federation_dir", "out")[0] == 0
    common = {"audit": None, "revision": None, "allow_public": False}
    first = common | {"source": None, "create_pr": True, "private": True}
    second = common | {"source": "org/full", "create_pr": False, "private": False, "federation_dir": "out"}
    assert pushes == [
        ("push_adapter", str(adapters[0]), "org/adapter", first),
        ("push_merged", str(full_llama), "org/merged", second),
    ]
    check_error(run("push", adapters[0], "org/adapter", "--federation_dir", "out"), "Leave it out")
