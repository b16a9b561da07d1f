# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The commands of recipes/README.md that name models and data of the Hub, run on stand-ins of the same names."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from transformers import ModernBertConfig, ModernBertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .rows import RECIPES, WORDS


pytest.importorskip("sklearn")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Instead of the whole training.
SHORTER = [
    "--num_rounds",
    "1",
    "--max_steps",
    "1",
    "--use_cpu",
    "true",
    "--report_to",
    "none",
    "--disable_tqdm",
    "true",
    "--overwrite",
    "true",
]


def read_commands(heading: str) -> list[list[str]]:
    """The commands under a heading, without `accelerate launch` or `python`."""
    section = (RECIPES / "README.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    block = re.search(r"```bash\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)[1].replace("\\\n", " ")
    words = [shlex.split(line) for line in block.splitlines() if line.strip()]
    return [line[2:] if line[0] == "accelerate" else line[1:] for line in words]


@pytest.fixture
def run_command(load_recipe, monkeypatch, tmp_path):
    """Run a command of the page in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(command: list[str], *more: str) -> None:
        script = Path(command[0])
        assert (RECIPES.parent / script).is_file()
        monkeypatch.setattr(sys, "argv", [*command, *more])
        load_recipe(script.stem).main()

    return run


def save_model(model, tokenizer_dir: Path, directory: str) -> None:
    model.save_pretrained(directory)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(directory)


def test_your_own_data_and_model(run_command, tokenizer_dir):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    model = ModernBertModel(ModernBertConfig(vocab_size=64, **sizes, **tokens))
    save_model(model, tokenizer_dir, "answerdotai/ModernBERT-base")
    rows = [{"text": f"{WORDS[row % 8]} plot", "label": row % 2, "hospital": f"h{row % 3}"} for row in range(24)]
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    Path("our_small_sample.csv").write_text("\n".join(lines) + "\n")
    Path("classes.json").write_text(json.dumps(["good", "bad"]))
    from datasets import Dataset

    for name in ("clients", "held_out"):
        Dataset.from_list(rows).to_parquet(f"{name}.parquet")
    warmup, federation = read_commands("Your own data and model")
    run_command(warmup, "--max_steps", "1", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no")
    run_command(federation, *SHORTER)
    record = json.loads(Path("out/federation/metrics.jsonl").read_text().splitlines()[-1])
    assert set(record["clients"]) == {"h0", "h1", "h2"}
    assert json.loads(Path("out/federation/_merged/config.json").read_text())["id2label"] == {"0": "good", "1": "bad"}


def test_a_gpu(run_command, tokenizer_dir):
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    save_model(Qwen3ForCausalLM(config), tokenizer_dir, "Qwen/Qwen3-0.6B")
    rows = [{"instruction": f"{WORDS[row % 8]} graph", "output": WORDS[(row + 1) % 8]} for row in range(400)]
    Path("tatsu-lab/alpaca").mkdir(parents=True)
    Path("tatsu-lab/alpaca/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (command,) = read_commands("A GPU")
    run_command(command, *SHORTER, "--bf16", "false")
    record = json.loads(Path("out/qwen/metrics.jsonl").read_text().splitlines()[-1])
    assert len(record["clients"]) == 4  # of eight
    assert Path("out/qwen/_merged/model.safetensors").is_file()
