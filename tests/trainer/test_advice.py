# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Presets simulated on the owner's rows: which rows go where, what is refused, and a whole comparison."""

import json
import shutil

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from fedlpp_hf.config.presets import PRESETS, Preset, choose_presets, divide_steps, make_flags
from fedlpp_hf.trainer.advice import Simulation, simulate
from fedlpp_hf.trainer.advice_results import ADVICE_JSON, RESULT
from fedlpp_hf.trainer.advice_rows import RowSource, find_kind, prepare_rows, read_rows
from tests.helpers import make_tokenizer


@pytest.fixture
def full_model(full_llama, tmp_path):
    """The tiny Llama with a tokenizer of its words."""
    directory = shutil.copytree(full_llama, tmp_path / "full")
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def data(tmp_path):
    return str(write_rows(tmp_path / "rows.jsonl", 240))


def write_rows(path, count, columns=("prompt", "completion")):
    """Prompts that count upwards and go on so in their completions."""
    texts = [
        [" ".join(f"w{2 + (row + k) % 60}" for k in range(start, start + 4)) for start in (0, 4)]
        for row in range(count)
    ]
    lines = [json.dumps({**dict(zip(columns, pair, strict=True)), "site": row % 3}) for row, pair in enumerate(texts)]
    path.write_text("\n".join(lines))
    return path


def make_source(data, columns=None, **changes) -> RowSource:
    values = {
        "split": "train",
        "config": None,
        "columns": columns or {},
        "separator": " ",
        "max_length": 16,
        "most": 1000,
    }
    return RowSource(data, **values | changes)


def test_parts_share_no_row_and_are_the_same_each_time(full_model, data):
    found = prepare_rows(make_source(data), full_model, "site", 3, seed=0)
    assert {name: len(rows) for name, rows in found.parts.items()} == {
        "clients": 145,
        "test": 48,
        "selection": 19,
        "owner": 28,
    }
    assert found.kind == "completion" and found.dropped == 0
    assert set(found.parts["clients"]["client_group"]) == {"0", "1", "2"}
    assert found.digest == prepare_rows(make_source(data), full_model, "site", 3, seed=0).digest
    assert found.digest != prepare_rows(make_source(data), full_model, "site", 3, seed=1).digest
    assert found.digest != prepare_rows(make_source(data, most=239), full_model, "site", 3, seed=0).digest


def test_loss_is_on_what_is_to_be_learned(full_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(full_model)
    rows = write_rows(tmp_path / "rows.jsonl", 240, ("act", "answer"))
    columns = {"prompt": "act", "completion": "answer"}
    row = prepare_rows(make_source(str(rows), columns), full_model, None, 2, seed=0).parts["test"][0]
    assert row["labels"][:4] == [-100] * 4 and row["labels"][4:] == row["input_ids"][4:] and len(row["labels"]) == 9
    assert row["labels"][-1] == tokenizer.eos_token_id
    text = prepare_rows(make_source(str(rows), {"text": "answer"}), full_model, None, 2, seed=0).parts["test"][0]
    assert text["labels"] == text["input_ids"] and len(text["labels"]) == 5
    short = prepare_rows(make_source(str(rows), columns, max_length=5), full_model, None, 2, seed=0)
    assert short.parts["test"][0]["labels"][:4] == [-100] * 4 and short.dropped == 0
    with pytest.raises(ValueError, match="There are 0 rows"):  # prompts fill max_length
        prepare_rows(make_source(str(rows), columns, max_length=4), full_model, None, 2, seed=0)


def test_messages_are_learned_by_their_last_answer(full_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(full_model)
    talk = [
        [{"role": "user", "content": "w2 w3"}, {"role": "assistant", "content": f"w{4 + n % 9}"}] for n in range(240)
    ]
    Dataset.from_dict({"messages": talk}).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="no chat template"):
        prepare_rows(make_source(str(tmp_path / "rows")), full_model, None, 2, seed=0)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w60 ' if m.role == 'user' else 'w61 ' }}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w61 {% endif %}"
    )
    tokenizer.save_pretrained(full_model)
    row = prepare_rows(make_source(str(tmp_path / "rows")), full_model, None, 2, seed=0).parts["test"][0]
    assert row["input_ids"][:4] == [60, 2, 3, 61] and row["labels"][:4] == [-100] * 4
    assert row["labels"][4:] == row["input_ids"][4:] and 4 <= row["labels"][4] <= 12


def test_classes_are_the_models(full_bert, tmp_path):
    full = shutil.copytree(full_bert, tmp_path / "full")
    make_tokenizer().save_pretrained(full)
    rows = Dataset.from_dict({"text": ["w2 w3"] * 240, "label": [n % 3 for n in range(240)]})
    rows.to_json(tmp_path / "rows.jsonl")
    found = prepare_rows(make_source(str(tmp_path / "rows.jsonl")), str(full), "label", 2, seed=0)
    assert found.kind == "classification" and set(found.parts["test"]["label"]) == {0, 1, 2}
    rows.map(lambda row: {"label": row["label"] + 1}).to_json(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="class 3, and the model a head for LABEL_0, LABEL_1, LABEL_2"):
        prepare_rows(make_source(str(tmp_path / "other.jsonl")), str(full), None, 2, seed=0)


@pytest.mark.parametrize(
    "names, columns, kind",
    [
        (["text", "label"], {}, "classification"),
        (["text", "label"], {"text": "text"}, "classification"),
        (["text", "site"], {}, "text"),
        (["prompt", "completion", "text"], {}, "completion"),
        (["messages", "text"], {}, "messages"),
        (["act", "text"], {"prompt": "act", "completion": "text"}, "completion"),
    ],
    ids=str,
)
def test_columns_tell_the_kind(names, columns, kind):
    assert find_kind(names, columns) == kind


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"text": "body"}, "text_column='body', but the rows have the columns act, site"),
        ({}, "columns act, site; expected `messages`; `prompt` and `completion`; .*Say which column"),
        ({"prompt": "act"}, "expected `messages`"),  # no completion
    ],
)
def test_unknown_columns_are_named(columns, message):
    with pytest.raises(ValueError, match=message):
        find_kind(["act", "site"], columns)


def test_rows_that_can_not_be_had_are_refused(full_model, tmp_path):
    with pytest.raises(ValueError, match="no.jsonl` can't be read as rows .*expected a .jsonl"):
        read_rows(make_source(str(tmp_path / "no.jsonl")))
    DatasetDict({"test": Dataset.from_dict({"text": ["w2"]})}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="no split `train`; expected one of test"):
        read_rows(make_source(str(tmp_path / "splits")))
    Dataset.from_dict({"text": ["w2", None]}).save_to_disk(tmp_path / "gaps")
    with pytest.raises(ValueError, match="Row 1 has 'None' in the column `text`, of type NoneType; expected text"):
        prepare_rows(make_source(str(tmp_path / "gaps")), full_model, None, 2, seed=0)
    few = str(write_rows(tmp_path / "few.jsonl", 120))
    with pytest.raises(ValueError, match="There are 120 rows; 4 clients, .* need 201"):
        prepare_rows(make_source(few), full_model, None, 4, seed=0)
    with pytest.raises(
        ValueError, match="Clients by the column `hospital`, but the rows have prompt, completion, site"
    ):
        prepare_rows(make_source(few), full_model, "hospital", 2, seed=0)


def test_presets_are_options_of_the_federation(full_model, data, tmp_path):
    simulation = make_simulation(full_model, data, tmp_path)
    for preset in PRESETS:
        args = simulation.make_args(preset)
        assert args.audit and not args.merge and args.max_steps * args.num_rounds == args.audit_steps == 6
        assert args.base_bits == preset.options["base_bits"]
    with pytest.raises(
        ValueError, match="The preset `odd`: Unknown option `--num_clint`; did you mean `--num_clients`"
    ):
        simulation.make_args(Preset("odd", "", {"num_rounds": 2, "num_clint": 2}))
    with pytest.raises(ValueError, match="The preset `long`: steps=6 in 10 rounds"):
        simulation.make_args(Preset("long", "", {"num_rounds": 10}))
    assert simulation.make_args(Preset("own", "", {"num_rounds": 10, "max_steps": 3})).max_steps == 3
    assert make_flags({"a": [0.5, 1], "b": None, "c": True, "d": {"x": 1}}) == [
        "--a",
        "0.5",
        "1",
        "--c",
        "True",
        "--d",
        '{"x": 1}',
    ]
    assert divide_steps({"num_rounds": 3}, 10) == 3


def test_users_presets_are_checked(tmp_path):
    (tmp_path / "ours.yaml").write_text("base_bits: 2\n")
    found = choose_presets(["strict"], {"ours": str(tmp_path / "ours.yaml")})
    assert [preset.name for preset in found] == ["strict", "ours"] and found[1].options == {"base_bits": 2}
    with pytest.raises(ValueError, match="no preset `strickt`; did you mean `strict`"):
        choose_presets(["strickt"], {})
    with pytest.raises(ValueError, match="preset `strict` exists already"):
        choose_presets(None, {"strict": str(tmp_path / "ours.yaml")})
    (tmp_path / "ours.yaml").write_text("audit_steps: 2\n")
    with pytest.raises(ValueError, match="ours.yaml` sets `audit_steps`, which the simulation sets itself"):
        choose_presets(None, {"ours": str(tmp_path / "ours.yaml")})


def make_simulation(full_model, data, tmp_path, **changes) -> Simulation:
    values = {"flags": ["--num_clients", "2", "--use_cpu", "true", "--learning_rate", "0.01"], "steps": 6} | changes
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    return Simulation.prepare(
        full_model, make_source(data), values["flags"], values["steps"], lora, tmp_path / "advice"
    )


def test_directory_of_something_else_is_left_alone(full_model, data, tmp_path):
    simulation = make_simulation(full_model, data, tmp_path)
    (tmp_path / "advice").mkdir()
    (tmp_path / "advice" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="advice` exists and holds something else"):
        simulate(simulation, PRESETS, 0.1, show=False)
    assert [path.name for path in (tmp_path / "advice").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_presets_are_compared_and_those_that_are_done_are_not_run_again(full_model, data, tmp_path):
    own = Preset("own", "one round", {"num_rounds": 1, "base_bits": 4}, selects=False)
    broken = Preset("broken", "no base", {"num_rounds": 1, "base_bits": 32, "base_weights": [0.0, 0.5]})
    simulation = make_simulation(full_model, data, tmp_path)
    presets = [Preset("never", "nothing sent", {"num_rounds": 1, "broadcast": "never", "base_bits": 4})]
    results, _ = simulate(simulation, presets, 0.1, show=False)
    assert len(results[0].before) == 48 and results[0].stolen.high == 0.0 and results[0].down < 2000 < results[0].up
    assert results[0].base_bytes > 10_000 and results[0].seconds > 0
    path = tmp_path / "advice" / "never" / RESULT
    first = path.read_bytes()
    both, found = simulate(simulation, [*presets, own], 0.1, show=False)
    assert path.read_bytes() == first and both[0] == results[0]
    values = json.loads((tmp_path / "advice" / ADVICE_JSON).read_text())
    assert [preset["name"] for preset in values["presets"]] == ["never", "own"]
    assert values["recommendation"]["name"] == found.name
    assert both[1].down > both[0].down  # the proxy
    text = (tmp_path / "advice" / "advice.md").read_text()
    assert str(tmp_path) not in text and "145 of the owner's rows" in text
    with pytest.raises(ValueError, match="another simulation: it differs in flags, steps"):
        simulate(
            make_simulation(full_model, data, tmp_path, steps=7, flags=["--num_clients", "2", "--use_cpu", "true"]),
            presets,
            0.1,
            show=False,
        )
    failing, _ = simulate(simulation, [*presets, broken], 0.1, show=False)
    assert failing[0] == results[0] and failing[1].failure.startswith(
        "Failed: base_weights=[0.0, 0.5]: the owner needs the base"
    )
    assert not (tmp_path / "advice" / "broken" / RESULT).exists()  # it is tried again
    with pytest.raises(ValueError, match="never` has the result of another preset of that name"):
        simulate(simulation, [Preset("never", "", {"num_rounds": 1})], 0.1, show=False)
