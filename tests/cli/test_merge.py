# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`fedlpp-hf merge` writes what `merge_adapter` writes, and `fedlpp-hf push` finds out what to push."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
from peft import PeftConfig

from fedlpp_hf.hub import push as hub
from fedlpp_hf.merge.merge import merge_adapter
from fedlpp_hf.tensors.adapters import read_adapter
from tests.helpers import assert_fails_in_one_line, make_federation, read_table


WEIGHTS = "model.safetensors"


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
    assert_fails_in_one_line(
        run("merge", full_llama, *adapters, tmp_path / "x", "--weights", 1), "1 weights for 2 adapters"
    )


def test_merge_moves_towards_the_base_as_the_federation_chose(run, full_llama, adapters, llama_base, tmp_path):
    store = make_federation(tmp_path / "out", adapters[0], base_weight=0.5)
    shutil.copytree(adapters[0], tmp_path / "out", dirs_exist_ok=True)
    for name, weight in (("half", 0.5), ("plain", 0.0)):
        merge_adapter(full_llama, adapters[0], tmp_path / name, base_dir=llama_base, base_weight=weight)
    half, plain = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("half", "plain"))
    assert half != plain

    def merge(name, *options):
        result = run("merge", full_llama, tmp_path / "out", tmp_path / name, *options)
        assert result[0] == 0, result
        return (tmp_path / name / WEIGHTS).read_bytes(), result[1]

    assert_fails_in_one_line(
        run("merge", full_llama, tmp_path / "out", tmp_path / "x"),
        "W − 0.5·E, and its base is not beside it. Give --base_dir",
    )
    assert merge("given", "--base_dir", llama_base)[0] == half
    shutil.copytree(llama_base, store.root / "base")
    written, shown = merge("found")
    assert written == half and "Merged into W − 0.5·E" in shown
    assert merge("refused", "--base_weight", 0)[0] == plain


def test_merge_in_json(run, full_llama, adapters, tmp_path):
    code, out, _ = run("merge", full_llama, adapters[0], tmp_path / "cli", "--json", "--verify")
    values = json.loads(out)
    report = merge_adapter(full_llama, adapters[0], tmp_path / "function", verify=True)
    expected = json.loads(json.dumps(report.to_dict())) | {"output_dir": str(tmp_path / "cli"), "commit_url": None}
    assert code == 0 and values | {"seconds": 0} == expected | {"seconds": 0}


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


def test_merge_pushes_what_it_wrote(run, pushes, full_llama, adapters, tmp_path):
    federation = make_federation(tmp_path / "out", adapters[0])
    federation.publish(read_adapter(adapters[0])[0], PeftConfig.from_pretrained(adapters[0]))
    arguments = ["merge", full_llama, federation.output_dir, tmp_path / "merged"]
    code, out, _ = run(*arguments, "--push", "org/merged")
    assert code == 0 and "Pushed to https://hub/commit" in out and (tmp_path / "merged" / WEIGHTS).is_file()
    options = {"source": str(full_llama), "federation_dir": str(federation.output_dir)}
    options |= {"private": True, "allow_public": False}
    assert pushes == [("push_merged", str(tmp_path / "merged"), "org/merged", options)]
    pushed = run(*arguments[:-1], tmp_path / "again", "--push", "org/merged", "--json")
    assert json.loads(pushed[1])["commit_url"] == "https://hub/commit"
    assert_fails_in_one_line(run(*arguments[:-1], tmp_path / "other", "--public"), "give --push REPO_ID")
    assert not (tmp_path / "other").exists()


def test_push_tells_an_adapter_from_a_merged_model(run, pushes, full_llama, adapters):
    assert run("push", adapters[0], "org/adapter", "--create-pr")[0] == 0
    options = ["--public", "--source", "org/full", "--federation_dir", full_llama.parent, "--json"]
    code, out, _ = run("push", full_llama, "org/merged", *options)
    assert code == 0 and json.loads(out) == {"repo_id": "org/merged", "commit_url": "https://hub/commit"}
    common = {"audit": None, "revision": None, "allow_public": False}
    first = common | {"source": None, "create_pr": True, "private": True}
    second = common | {"source": "org/full", "create_pr": False, "private": False}
    second["federation_dir"] = str(full_llama.parent)
    assert pushes == [
        ("push_adapter", str(adapters[0]), "org/adapter", first),
        ("push_merged", str(full_llama), "org/merged", second),
    ]
    assert_fails_in_one_line(run("push", adapters[0], "org/adapter", "--federation_dir", full_llama), "Leave it out")
