# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Small models with random weights, to try the recipes for which no trained one can be had without the Hub.

    python recipes/data/random_models.py out/random

writes `t5` (seq2seq.py), `vit` (image_classification.py) and `whisper` (speech_recognition.py), each with its tokenizer or processor.
They know nothing: a run shows how the loss falls, and not how good a trained model gets.
"""

import argparse
from pathlib import Path

import torch
from docstrings import LIBRARIES, find_source, list_files, read_docstrings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)


VOCABULARY = 1024
NUM_FILES = 50  # of each library: what the tokenizers are trained on
WHISPER = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|translate|>"]
WHISPER += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]


def train_bpe(special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of docstrings."""
    texts = []
    for library in LIBRARIES:
        root = find_source(library)
        for path in list_files(root, seed=0)[:NUM_FILES]:
            texts += read_docstrings(root / path)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


def make_t5(output_dir: Path) -> None:
    tokenizer = train_bpe(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(output_dir)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=128, d_ff=256, d_kv=32, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(output_dir)


def make_vit(output_dir: Path) -> None:
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(output_dir)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, num_labels=10, **size)).save_pretrained(
        output_dir
    )


def make_whisper(output_dir: Path) -> None:
    trained = train_bpe(WHISPER)
    trained.model.save(str(output_dir))
    tokenizer = WhisperTokenizer(
        vocab=trained.get_vocab(),
        merges=[tuple(line.split(" ")) for line in (output_dir / "merges.txt").read_text("utf-8").splitlines()[1:]],
        pad_token="<|endoftext|>",
        additional_special_tokens=WHISPER[1:],
    )
    extractor = WhisperFeatureExtractor(chunk_length=5)  # seconds
    WhisperProcessor(extractor, tokenizer).save_pretrained(output_dir)
    ids = {name: trained.token_to_id(token) for name, token in zip(("end", "start"), WHISPER, strict=False)}
    config = WhisperConfig(
        vocab_size=VOCABULARY, d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, max_source_positions=250,
        max_target_positions=64, decoder_start_token_id=ids["start"], eos_token_id=ids["end"], pad_token_id=ids["end"],
        bos_token_id=ids["end"], suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.is_multilingual = True
    model.generation_config.lang_to_id = {token: trained.token_to_id(token) for token in WHISPER[2:4]}
    model.generation_config.task_to_id = {token.strip("<|>"): trained.token_to_id(token) for token in WHISPER[4:6]}
    model.generation_config.no_timestamps_token_id = trained.token_to_id(WHISPER[-1])
    model.generation_config.max_length = 64
    model.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, make in {"t5": make_t5, "vit": make_vit, "whisper": make_whisper}.items():
        directory = args.output_dir / name
        directory.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        make(directory)
        print(directory)


if __name__ == "__main__":
    main()
