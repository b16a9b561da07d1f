# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated LoRA of a speech recognizer (Whisper, or any other that hears log-mel features).

    pip install -c constraints.txt ".[demo,speech]"
    accelerate launch recipes/speech_recognition.py --config recipes/configs/speech_recognition.yaml

Hardware and expected result: see the head of the config, and the table in recipes/README.md. The metric is the word error rate of
what the model writes.

Sound comes from the Hub, or from files that a column of a .jsonl or .csv names, relative to it. soundfile reads them (WAV, FLAC,
Ogg, MP3): torchcodec and FFmpeg are not needed. Features are made when a batch is: made before, 30 seconds take a megabyte on
disk. This script is the clients' side: if `model_name_or_path` names the owner's full model, a separate owner process opens it,
and this one sees no weights but the quantized base. Any flag overrides the config.
"""

import functools
import io
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import soundfile
import torch
from datasets import Audio, Dataset, load_dataset
from peft import LoraConfig
from scipy.signal import resample_poly
from transformers import AutoProcessor, GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments

from fedlpp_hf import FederatedConfig, FederatedMixin, parse_args


METRIC = str(Path(__file__).parent / "metrics" / "word_error_rate.py")


@dataclass
class RecipeArguments:
    model_name_or_path: str = field(
        metadata={"help": "The owner's full model, or a base made by `fedlpp-hf quantize`."}
    )
    train_data: str = field(metadata={"help": "Hub id, or a .jsonl, .json, .csv or .parquet file: the clients' rows."})
    eval_data: str = field(metadata={"help": "As train_data: the rows that every round is evaluated on."})
    owner_data: str | None = field(
        default=None, metadata={"help": "As train_data: the owner's rows, which choose λ and the round to publish."}
    )
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Split of train_data, if it is on the Hub."})
    eval_split: str = field(default="test", metadata={"help": "Split of eval_data, if it is on the Hub."})
    owner_split: str = field(default="train", metadata={"help": "Split of owner_data, if it is on the Hub."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate on this many rows, drawn at random."})
    audio_column: str = field(default="audio", metadata={"help": "Column with the sound, or its path."})
    text_column: str = field(default="text", metadata={"help": "Column with what is said."})
    language: str | None = field(default=None, metadata={"help": "Such as `de`, for a model of several languages."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Linear layers that get an adapter."}
    )


@dataclass
class FederatedSpeechConfig(Seq2SeqTrainingArguments, FederatedConfig):
    """The trainer's options and the federation's."""


class FederatedSpeechTrainer(FederatedMixin, Seq2SeqTrainer):
    """The trainer; its `train()` runs the federation."""


def read_rows(source: str, split: str, arguments: RecipeArguments) -> Dataset:
    """Rows with `audio`, the path or bytes of a file, and `text`."""
    suffix, folder = Path(source).suffix.removeprefix("."), Path(source).parent
    names = {arguments.audio_column: "audio", arguments.text_column: "text"}
    if suffix in ("json", "jsonl", "csv"):
        rows = load_dataset(suffix.replace("jsonl", "json"), data_files=source, split="train").rename_columns(names)
        return rows.map(lambda row: {"audio": {"path": str(folder / row["audio"]), "bytes": None}})
    rows = load_dataset(source, arguments.data_config, split=split).rename_columns(names)
    return rows.cast_column("audio", Audio(decode=False))


# The owner's process uses all of these, too: they travel there by value.
def read_sound(file: dict[str, Any], rate: int) -> np.ndarray:
    """The samples of a file, mono, at `rate` per second."""
    samples, own = soundfile.read(io.BytesIO(file["bytes"]) if file["bytes"] else file["path"], always_2d=True)
    return resample_poly(samples.mean(axis=1), rate // gcd(rate, own), own // gcd(rate, own))


@dataclass
class SpeechCollator:
    """`input_features` and `labels` of rows; -100 keeps padding out of the loss."""

    processor: Any
    start: int  # the decoder's first token: the model puts it in front of the labels itself

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rate = self.processor.feature_extractor.sampling_rate
        sounds = [read_sound(row["audio"], rate) for row in rows]
        features = self.processor.feature_extractor(sounds, sampling_rate=rate, return_tensors="pt")
        texts = self.processor.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        labels = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)
        labels = labels[:, 1:] if (labels[:, 0] == self.start).all() else labels
        return {"input_features": features["input_features"], "labels": labels}


def compute_metrics(prediction, tokenizer) -> dict[str, float]:
    texts = [
        tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)
        for ids in (prediction.predictions, prediction.label_ids)
    ]
    said, true = ([tokenizer.basic_normalize(text) for text in part] for part in texts)
    return evaluate.load(METRIC).compute(predictions=said, references=true)


def main() -> None:
    arguments, args = parse_args((RecipeArguments, FederatedSpeechConfig))
    args.remove_unused_columns = False  # the model does not take sound; the collator does
    name = arguments.model_name_or_path
    speaks = {"language": arguments.language, "task": "transcribe"} if arguments.language else {}
    processor = AutoProcessor.from_pretrained(name, **speaks)
    args.generation_config = GenerationConfig.from_pretrained(name, **speaks)

    def read(source: str, split: str, count: int | None = None) -> Dataset:
        with args.main_process_first():  # the others find it in the cache
            rows = read_rows(source, split, arguments)
            return rows if count is None else rows.shuffle(seed=0).take(min(count, len(rows)))

    trainer = FederatedSpeechTrainer(
        model=name,
        args=args,
        train_dataset=read(arguments.train_data, arguments.train_split),
        eval_dataset=read(arguments.eval_data, arguments.eval_split, arguments.max_eval_rows),
        selection_dataset=read(arguments.owner_data, arguments.owner_split) if arguments.owner_data else None,
        processing_class=processor,
        data_collator=SpeechCollator(processor, args.generation_config.decoder_start_token_id),
        compute_metrics=functools.partial(compute_metrics, tokenizer=processor.tokenizer),
        peft_config=LoraConfig(
            r=arguments.lora_r, lora_alpha=arguments.lora_alpha, target_modules=arguments.target_modules
        ),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
