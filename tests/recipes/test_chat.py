# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated instruction tuning of a chat model: the data, the template, and a whole run of `make quickstart-lm` on a tiny model."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from .rows import RECIPES, WORDS


TEMPLATE = "{% for message in messages %}<s> {{ message['content'] }} {% endfor %}{% if add_generation_prompt %}<unk> {% endif %}"
CONFIG = RECIPES / "configs" / "quickstart_lm.yaml"


@pytest.fixture
def chat_model(full_llama, tokenizer_dir, tmp_path) -> Path:
    """A tiny random Llama with a chat template."""
    directory = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(full_llama).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def data(tmp_path) -> Path:
    """Rows as recipes/data/summaries.py writes them: the answer is the prompt's first word, twice."""
    for split, count in (("train", 48), ("test", 24), ("owner", 40)):
        rows = [
            {"prompt": " ".join(words), "completion": f"{words[0]} {words[0]}", "library": f"team-{index % 3}"}
            for index in range(count)
            for words in [[WORDS[(index + place) % 8] for place in range(3)]]
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the number of nodes.\n\n" + "word " * 13, ("word " * 13, "Return the number of nodes.")),
        ("Return the number of nodes.\n\n" + "word " * 33, ("word " * 32 + "...", "Return the number of nodes.")),
        ("Return the\nnumber of nodes.\n\n\n" + "word\n" * 12, ("word " * 12, "Return the number of nodes.")),
        ("Return the number of nodes.\n\n" + "word " * 11, None),  # too short to summarize
        ("Return the number of nodes\n\n" + "word " * 13, None),  # a title, not a sentence
        ("Return nodes. Return the edges.\n\n" + "word " * 13, None),
        ("Return the number of `nodes`.\n\n" + "word " * 13, None),
        ("Return the number of nodes.\n\nParameters\n----------\n" + "word " * 13, None),
        ("Return the number of nodes.", None),
    ],
)
def test_row_of_a_docstring(load_recipe, docstring, expected):
    found = load_recipe("summaries").read_row(docstring)
    assert found == (expected and (expected[0].strip(), expected[1]))


def test_data_is_deterministic_and_no_file_is_on_both_sides(load_recipe, tmp_path, monkeypatch):
    summaries = load_recipe("summaries")
    list_files, files = summaries.list_files, {}

    def list_few(root, seed):
        return list_files(root, seed)[:40]

    def collect(library, seed):
        for row in collect_rows(library, seed):
            files[row["row"]["prompt"]] = row["file"]
            yield row

    collect_rows = summaries.collect_rows
    monkeypatch.setattr(summaries, "list_files", list_few)
    monkeypatch.setattr(summaries, "collect_rows", collect)
    for name in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["summaries.py", str(tmp_path / name)])
        summaries.main()
    rows = {}
    for split in ("train", "test", "owner"):
        text = (tmp_path / "first" / f"{split}.jsonl").read_bytes()
        assert text == (tmp_path / "second" / f"{split}.jsonl").read_bytes()
        rows[split] = [json.loads(line) for line in text.splitlines()]
        assert rows[split]
    sources = {split: {files[row["prompt"]] for row in found} for split, found in rows.items()}
    assert not sources["train"] & sources["test"]
    assert {row["library"] for row in rows["owner"]} == {"python"}
    assert {row["library"] for row in rows["train"]} <= set(summaries.CLIENTS)
    prompts = [row["prompt"] for found in rows.values() for row in found]
    assert len(set(prompts)) == len(prompts) and all(prompt.startswith(summaries.INSTRUCTION) for prompt in prompts)


def test_chat_prompts_go_through_the_template(load_recipe, chat_model):
    recipe, tokenizer = load_recipe("causal_lm"), AutoTokenizer.from_pretrained(chat_model)
    options = {"model_name_or_path": "m", "train_data": "x", "eval_data": "x", "prompt_column": "act"}
    arguments = recipe.RecipeArguments(**options, completion_column="text", chat=True)
    found = recipe.encode_rows({"act": ["graph node"], "text": ["plot axis"]}, arguments, tokenizer)
    told = [{"role": "user", "content": "graph node"}]
    start = tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(start) == "<s> graph node <unk>"
    assert tokenizer.decode(found["input_ids"][0]) == "<s> graph node <unk> plot axis </s>"
    assert found["labels"][0] == [-100] * len(start) + found["input_ids"][0][len(start) :]


def test_chat_without_a_prompt_is_refused(load_recipe, chat_model, data, monkeypatch):
    flags = ["--model_name_or_path", str(chat_model), "--train_data", "x.jsonl", "--eval_data", "x.jsonl"]
    flags += ["--chat", "true", "--output_dir", str(data / "out"), "--use_cpu", "true", "--partition", "library"]
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", *flags])
    with pytest.raises(ValueError, match="chat=True without prompt_column"):
        load_recipe("causal_lm").main()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_lm(load_recipe, chat_model, data, monkeypatch, capsys):
    """The config of `make quickstart-lm`, and the answers before and after it."""
    out = data / "out"
    flags = ["--config", str(CONFIG), "--model_name_or_path", str(chat_model), "--output_dir", str(out)]
    for split, option in (("train", "train_data"), ("test", "eval_data"), ("owner", "owner_data")):
        flags += [f"--{option}", str(data / f"{split}.jsonl")]
    flags += ["--learning_rate", "2e-2", "--audit_rows", "16", "--disable_tqdm", "true"]
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", *flags])
    load_recipe("causal_lm").main()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [len(record["clients"]) for record in records] == [0, 3, 3]
    assert records[-1]["metrics"]["server"]["eval_loss"] < records[0]["metrics"]["server"]["eval_loss"] - 0.1
    audit = json.loads((out / "audit.json").read_text())
    assert audit["coalitions"][0]["stolen"]["loss"]["value"] == 0.0  # nothing was sent

    flags = ["--before", str(chat_model), "--after", str(out / "_merged"), "--data", str(data / "test.jsonl")]
    monkeypatch.setattr(sys, "argv", ["answers.py", *flags, "--output_file", str(out / "answers.md")])
    capsys.readouterr()
    load_recipe("answers").main()
    text = (out / "answers.md").read_text()
    assert capsys.readouterr().out == text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert [name for name, _ in cells] == ["prompt", "before", "after", "expected"] * 5
    for place in range(0, 20, 4):
        (_, prompt), (_, before), (_, after), (_, expected) = cells[place : place + 4]
        assert expected == f"{prompt.split()[0]} {prompt.split()[0]}"
        assert before != after
