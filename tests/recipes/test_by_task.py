# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The recipes by task: each read, and each run on a tiny model with random weights and rows made here."""

import ast
import importlib
import json
import sys
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from fedlpp_hf.base.export import export_base
from fedlpp_hf.config.arguments import parse_args

from .rows import RECIPES, SCRIPTS, WORDS


pytest.importorskip("sklearn")
pytest.importorskip("trl", reason="needs the extra [trl]")
pytestmark = pytest.mark.timeout(600)

SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY = 64
TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
DIGITS = ("zero", "one")


def say(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def make_row(index: int) -> dict:
    """A row with the columns of every text recipe; the answer repeats the words of the question."""
    words = [WORDS[(index + place) % len(WORDS)] for place in range(4)]
    text, other = " ".join(words), " ".join(reversed(words))
    return {
        "messages": [say("user", text), say("assistant", text)],
        "prompt": [say("user", text)],
        "chosen": [say("assistant", text)],
        "rejected": [say("assistant", other)],
        "reference": text,
        "document": text,
        "summary": other,
        "anchor": text,
        "positive": f"{other} {WORDS[index % 3]}",
        "tokens": words,
        "ner_tags": ["B-AXIS" if word == "axis" else "O" for word in words],
        "team": f"team-{index % 2}",
    }


@dataclass(frozen=True)
class Recipe:
    """How a recipe is run: on which columns and model, with which flags, and what must change."""

    columns: tuple[str, ...] = ()
    arguments: str = ""
    model: str = "llama"
    metric: str = "eval_loss"
    learns: bool = True


TRL = "--bf16 false --gradient_checkpointing false"
BY_TASK = {
    "sft": Recipe(("messages",), f"{TRL} --max_length 32 --packing true --eval_packing false"),
    "dpo": Recipe(("prompt", "chosen", "rejected"), f"{TRL} --max_length 32"),
    "reward": Recipe(("prompt", "chosen", "rejected"), f"{TRL} --max_length 32"),
    "grpo": Recipe(
        ("prompt", "reference"),
        f"{TRL} --num_generations 2 --per_device_train_batch_size 2 --per_device_eval_batch_size 2 "
        "--max_completion_length 6 --reference_column reference",
        metric="eval_reward",
        learns=False,
    ),
    "seq2seq": Recipe(
        ("document", "summary"),
        "--bf16 false --source_column document --target_column summary --generation_max_length 8",
        "t5",
    ),
    "token_classification": Recipe(("tokens", "ner_tags"), "--tag_names O B-AXIS", "bert", metric="eval_accuracy"),
    "sentence_embeddings": Recipe(("anchor", "positive"), "", "bert", metric="eval_cosine_mrr@10"),
    "image_classification": Recipe((), "--image_column image --partition iid", "vit"),
    "speech_recognition": Recipe(
        ("audio", "text"), "--text_column text --language en --generation_max_length 8", "whisper"
    ),
}


def import_recipe(name: str):
    """The recipe as a module; skips where what it needs is not installed."""
    for library in {"sentence_embeddings": ["sentence_transformers"], "speech_recognition": ["soundfile"]}.get(
        name, []
    ):
        pytest.importorskip(library)
    return importlib.import_module(name)


@pytest.fixture
def recipes(monkeypatch):
    """Recipes can be imported by name, as a spawned process will do too, and are gone afterwards."""
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.syspath_prepend(str(RECIPES / "data"))
    yield import_recipe
    for name in (*BY_TASK, *(path.stem for path in (RECIPES / "data").glob("*.py"))):
        sys.modules.pop(name, None)


# --- Without running them.
@pytest.mark.parametrize("name", BY_TASK)
def test_stands_alone_and_is_short(name):
    source = (RECIPES / f"{name}.py").read_text()
    assert source.count("\n") < 150
    modules = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    data = {path.stem for path in (RECIPES / "data").glob("*.py")}
    assert not modules & {*SCRIPTS, *BY_TASK, *data}
    assert f"accelerate launch recipes/{name}.py --config recipes/configs/{name}.yaml" in source


def test_every_recipe_is_tested():
    assert {path.stem for path in RECIPES.glob("*.py")} == {*SCRIPTS, *BY_TASK}


@pytest.mark.parametrize("name", BY_TASK)
def test_config_is_understood_and_a_typo_is_refused(name, recipes, tmp_path):
    recipe = recipes(name)
    federated = [kind for key, kind in vars(recipe).items() if key.startswith("Federated") and key.endswith("Config")]
    config_class = max(federated, key=lambda kind: len(kind.__mro__))  # the recipe's own, if it has one
    path = RECIPES / "configs" / f"{name}.yaml"
    flags = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    arguments, args = parse_args((recipe.RecipeArguments, config_class), ["--config", str(path), *flags])
    given = yaml.safe_load(path.read_text())
    assert arguments.model_name_or_path == given["model_name_or_path"] and "/" in arguments.train_data
    assert args.broadcast == "never" and args.base_weights == given["base_weights"]
    # Owner's, clients' and test rows are told apart by their splits.
    if owner := given.get("owner_split"):
        assert owner != given["train_split"] != given.get("eval_split")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(path.read_text() + "learning_rat: 0.1\n")
    with pytest.raises(ValueError, match="unknown key `learning_rat`.*learning_rate"):
        parse_args((recipe.RecipeArguments, config_class), ["--config", str(wrong), *flags])


# --- Metrics.
@pytest.mark.parametrize(
    ("script", "predictions", "references", "expected"),
    [
        ("rouge_l", ["the cat sat", ""], ["The cat on the mat sat", "a"], {"rouge_l": (2 * 3 / 9 + 0) / 2}),
        ("word_error_rate", ["a x c", "a b c d"], ["a b c", "b c"], {"wer": 3 / 5}),
        (
            "entities",
            [["B-A", "I-A", "O", "B-B"], ["I-A", "I-B"]],
            [["B-A", "I-A", "O", "B-A"], ["B-A", "B-B"]],
            {"f1": 2 * 3 / 8, "precision": 3 / 4, "recall": 3 / 4, "accuracy": 3 / 6},
        ),
    ],
)
def test_metrics_load_without_the_hub(script, predictions, references, expected):
    import evaluate

    metric = evaluate.load(str(RECIPES / "metrics" / f"{script}.py"))
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(expected)


def test_reward_is_the_f1_of_shared_words(recipes):
    recipe = recipes("grpo")
    answers = ["The cat sat", [say("assistant", "a dog")], "", "cat cat"]
    rewards = recipe.reward_overlap(answers, reference=["the cat", "a cat", "a", "cat"])
    assert rewards == pytest.approx([0.8, 0.5, 0, 2 / 3])


def test_a_tag_is_learned_at_the_first_token_of_its_word(recipes, tokenizer_dir):
    from datasets import Dataset

    recipe = recipes("token_classification")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    arguments = recipe.RecipeArguments("m", "x", "x", max_length=5)
    rows = Dataset.from_dict(
        {"tokens": [["graph", "node-edge", "plot"]], "ner_tags": [["O", "B-X", "O"]], "team": ["a"]}
    )
    row = recipe.tokenize_rows(rows, arguments, tokenizer, ["O", "B-X"], keep="team")[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["<s>", "graph", "node", "<unk>", "edge"]
    assert row["labels"] == [-100, 0, 1, -100, -100] and row["team"] == "a"


def test_sound_becomes_mono_at_the_models_rate(recipes, tmp_path):
    recipe = recipes("speech_recognition")
    write_tone(tmp_path / "tone.wav", 440, rate=22050)
    samples = recipe.read_sound({"path": str(tmp_path / "tone.wav"), "bytes": None}, 16000)
    assert len(samples) == pytest.approx(16000 / 2, abs=2)
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.fft.rfftfreq(len(samples), 1 / 16000)[spectrum.argmax()] == pytest.approx(440, abs=2)
    same = recipe.read_sound({"path": None, "bytes": (tmp_path / "tone.wav").read_bytes()}, 16000)
    assert np.array_equal(samples, same)


# --- Whole runs.
def write_tone(path: Path, frequency: float, rate: int = 22050) -> None:
    """Half a second of a tone."""
    samples = np.sin(2 * np.pi * frequency * np.arange(rate // 2) / rate)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat((samples * 2**14).astype("<i2"), 2).tobytes())


def write_model(kind: str, tokenizer_dir: Path, output_dir: Path) -> None:
    """A model with random weights and its tokenizer or processor."""
    output_dir.mkdir()
    torch.manual_seed(0)
    if kind == "whisper":
        script = importlib.import_module("random_models")
        script.NUM_FILES = 2  # reading more takes a minute
        return script.make_whisper(output_dir)
    if kind == "vit":
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(output_dir)
        config = ViTConfig(image_size=16, patch_size=8, num_labels=2, **SIZE)
        return ViTForImageClassification(config).save_pretrained(output_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(output_dir)
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "bert":
        return BertModel(BertConfig(max_position_embeddings=64, **SIZE, **ids)).save_pretrained(output_dir)
    if kind == "t5":
        config = T5Config(d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0, **ids)
        return T5ForConditionalGeneration(config).save_pretrained(output_dir)
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **SIZE, **ids)).save_pretrained(output_dir)


def write_data(recipe: Recipe, folder: Path) -> tuple[str, ...]:
    """The recipe's rows, and the flags that name them."""
    folder.mkdir()
    if recipe.model == "vit":
        for split in ("train", "test"):
            for index in range(16):
                path = folder / split / DIGITS[index % 2] / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8), 200 * (index % 2) + index, np.uint8)).save(path)
        return ("--train_data", str(folder), "--train_split", "train", "--eval_data", str(folder))
    if recipe.model == "whisper":
        rows = []
        for index in range(8):
            write_tone(folder / f"{index}.wav", 300 + 500 * (index % 2))
            rows.append({"audio": f"{index}.wav", "text": DIGITS[index % 2], "team": f"team-{index // 4}"})
    else:
        rows = [{name: make_row(index)[name] for name in (*recipe.columns, "team")} for index in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--train_data", str(folder / "rows.jsonl"), "--eval_data", str(folder / "rows.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_TASK)
def test_runs_on_a_base(name, recipes, tokenizer_dir, tmp_path, monkeypatch):
    module, recipe = recipes(name), BY_TASK[name]
    full, base, out = tmp_path / "full", tmp_path / "base", tmp_path / "out"
    write_model(recipe.model, tokenizer_dir, full)
    export_base(full, base)
    for file in full.iterdir():  # the processors, which a base does not have
        if not (base / file.name).exists() and file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    # Without the owner's rows: nobody here holds the full model.
    lines = (RECIPES / "configs" / f"{name}.yaml").read_text().splitlines(keepends=True)
    config = tmp_path / "config.yaml"
    config.write_text("".join(line for line in lines if not line.startswith(("owner_", "data_config"))))
    flags = f"--config {config} --model_name_or_path {base} --output_dir {out} --partition team --num_clients 2 --num_rounds 2"
    flags += " --max_steps 3 --learning_rate 1e-2 --base_weights 0 --broadcast every_round --use_cpu true --disable_tqdm true"
    data = write_data(recipe, tmp_path / "data")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.split(), *data, *recipe.arguments.split()])
    module.main()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [len(record["clients"]) for record in records] == [0, 2, 2]
    first, last = (records[place]["metrics"]["proxy"] for place in (0, -1))
    assert np.isfinite(list(last.values())).all()
    assert last[recipe.metric] != first[recipe.metric]
    assert last["eval_loss"] < first["eval_loss"] or not recipe.learns
    assert (out / "adapter_model.safetensors").is_file() and (out / "report.md").is_file()
