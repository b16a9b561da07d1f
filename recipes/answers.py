# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the model answered before the federation, and what it answers after: the same prompts, side by side.

    python recipes/answers.py --before out/smollm2 --after out/quickstart_lm/_merged --data out/summaries/test.jsonl \\
        --output_file out/quickstart_lm/answers.md

Hardware: two CPU cores; half a minute for five prompts to 135 M parameters. Expected: a Markdown file, which is printed, too.
Both models are the owner's own, in full precision: run this where the owner's files are. Answers are greedy, so they repeat.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlpp_hf import parse_args


@dataclass
class AnswerArguments:
    before: str = field(metadata={"help": "The full model before the federation, with a chat template."})
    after: str = field(metadata={"help": "The merged model after it: `_merged` in the federation's directory."})
    data: str = field(metadata={"help": "A .jsonl, .json, .csv or .parquet file that no client trained on."})
    output_file: str = field(metadata={"help": "Markdown file to write."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the user's message."})
    completion_column: str = field(default="completion", metadata={"help": "Column with the expected answer."})
    num_prompts: int = field(default=5, metadata={"help": "Take this many rows, the first ones."})
    max_new_tokens: int = field(default=40, metadata={"help": "Tokens of an answer; longer ones end with ' ...'."})


@torch.no_grad()
def answer(directory: str, prompts: list[str], max_new_tokens: int) -> list[str]:
    """The model's greedy answers to a user's messages."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    outputs = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    answers = outputs[:, inputs["input_ids"].shape[1] :]
    ended = (answers == tokenizer.eos_token_id).any(dim=1).tolist()
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [" ".join(text.split()) + ("" if complete else " ...") for text, complete in zip(texts, ended, strict=True)]


def main() -> None:
    (arguments,) = parse_args((AnswerArguments,))
    suffix = Path(arguments.data).suffix.removeprefix(".").replace("jsonl", "json")
    rows = load_dataset(suffix, data_files=arguments.data, split="train")
    rows = rows.take(min(arguments.num_prompts, len(rows)))
    prompts = rows[arguments.prompt_column][:]
    before = answer(arguments.before, prompts, arguments.max_new_tokens)
    after = answer(arguments.after, prompts, arguments.max_new_tokens)
    lines = ["| | |", "|---|---|"]
    for row, old, new in zip(rows, before, after, strict=True):
        cells = {"prompt": row[arguments.prompt_column], "before": old, "after": new}
        cells["expected"] = row[arguments.completion_column]
        lines += [f"| {name} | {' '.join(text.split()).replace('|', '¦')} |" for name, text in cells.items()]
    text = "\n".join(lines) + "\n"
    output = Path(arguments.output_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
