# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Builders that more than one test file uses."""

import socket
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from fedlpp_hf import (
    FederatedConfig,
    FederatedMixin,
    FederatedServer,
    FederatedTrainer,
    QuantizedBaseCallback,
    RoundStore,
)
from fedlpp_hf.flower.loading import load_rows, load_trainer
from fedlpp_hf.tensors.adapters import adapter_parameters, copy_adapter, read_adapter, write_adapter
from fedlpp_hf.wire.messages import ClientFailure


ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # real models and data, where the machine has them
VOCABULARY = 64  # of the tiny models in conftest.py


# --- Rows.
def make_rows(count: int = 24, seed: int = 0, clients: int = 3, length: int = 12) -> Dataset:
    """Rows of token ids for a causal language model, with a `client` column."""
    generator = torch.Generator().manual_seed(seed)
    # Each row counts upwards from a random token: something that a tiny model can learn.
    start = torch.randint(1, VOCABULARY - length, (count, 1), generator=generator)
    ids = (start + torch.arange(length)).tolist()
    names = [f"site-{row % clients}" for row in range(count)]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": ids, "attention_mask": [[1] * length] * count, "client": names}
    )


def make_labelled_rows(count: int = 24) -> Dataset:
    """Rows of token ids for a classifier of three classes, with a `client` column."""
    rows = make_rows(count)
    labels = [row["input_ids"][0] % 3 for row in rows]
    return rows.remove_columns("labels").add_column("labels", labels)


# --- Trainers, and the adapters in which they end.
def make_args(output_dir, cls=FederatedConfig, **options):
    """A federation of two short rounds."""
    defaults = {
        "num_rounds": 2,
        "partition": "client",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(str(output_dir), **{**defaults, **options})


def make_trainer(model, output_dir, lora, cls=FederatedTrainer, train_dataset=None, eval_dataset=None, **options):
    """A trainer of the federation of [`make_args`]."""
    rows = make_rows() if train_dataset is None else train_dataset
    return cls(
        model, make_args(output_dir, **options), train_dataset=rows, eval_dataset=eval_dataset, peft_config=lora
    )


def assert_equal(left, right):
    """Compare two adapters bit for bit."""
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def task_of(trainer, client="site-0"):
    """The task of one client in the first round, as the server would send it."""
    tasks = []

    def collect(asked):
        tasks.extend(asked)
        raise StopIteration

    server = FederatedServer(
        trainer.args,
        trainer.guard.initial,
        trainer.guard.peft_config,
        {name: len(rows) for name, rows in trainer.client_datasets.items()},
        trainer.guard.fingerprint,
    )
    with pytest.raises(StopIteration):
        server.run(collect)
    return next(task for task in tasks if task.client_id == client)


# --- Users' own trainers.
def make_sft_classes():
    """TRL's configuration and trainer, federated as the README says; a test that asks for them skips without TRL."""
    trl = pytest.importorskip("trl", reason="needs the extra [trl]")

    @dataclass
    class FederatedSFTConfig(trl.SFTConfig, FederatedConfig):
        pass

    class FederatedSFTTrainer(FederatedMixin, trl.SFTTrainer):
        pass

    return FederatedSFTConfig, FederatedSFTTrainer


def make_tokenizer():
    """A tokenizer of the tiny models' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def run_client_script(base, lora, task_dir, update_dir, rows):
    """What a partner's engineer has already, plus one callback."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    args = TrainingArguments(
        str(update_dir / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=rows, callbacks=[QuantizedBaseCallback(task_dir=task_dir, update_dir=update_dir)]
    )
    trainer.train()


# --- Full models to export. 101 words of width 40: neither rows nor matrices are whole blocks of 64.
_SMALL = {"vocab_size": 101, "hidden_size": 40, "intermediate_size": 76, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL_MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_SMALL, **_HEADS)),
    "llama_tied": (LlamaForCausalLM, LlamaConfig(**_SMALL, **_HEADS, tie_word_embeddings=True)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=101, n_embd=40, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
    ),
    "bert": (
        BertForSequenceClassification,
        BertConfig(**_SMALL, **_NO_DROPOUT, num_attention_heads=4, num_labels=3, max_position_embeddings=32),
    ),
    "roberta": (
        RobertaForSequenceClassification,
        RobertaConfig(**_SMALL, **_NO_DROPOUT, num_attention_heads=4, num_labels=3, max_position_embeddings=34),
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**_SMALL, **_HEADS, num_local_experts=3)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=101, d_model=40, d_ff=76, d_kv=10, num_layers=2, num_heads=4, dropout_rate=0.0),
    ),
    "vit": (
        ViTForImageClassification,
        ViTConfig(
            hidden_size=40, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
            **_NO_DROPOUT,
        ),
    ),
}  # fmt: skip


def model_inputs(name):
    """What a model of [`SMALL_MODELS`] takes."""
    if name == "vit":
        return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)}
    ids = torch.arange(3, 24)[None]
    return {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}


@torch.no_grad()
def compute_logits(model, name):
    """The answer of a model of [`SMALL_MODELS`] to [`model_inputs`]."""
    return model.eval()(**model_inputs(name)).logits


# --- Full models to merge into, with an adapter for each.
_TEXT = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_MOE = _TEXT | {"num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# class, configuration, query and value modules, task
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", _TEXT | {"num_key_value_heads": 2}, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "qwen2": ("Qwen2ForCausalLM", _TEXT | {"num_key_value_heads": 2}, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "qwen3": (
        "Qwen3ForCausalLM",
        _TEXT | {"num_key_value_heads": 2, "head_dim": 12},
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "mistral": ("MistralForCausalLM", _TEXT | {"num_key_value_heads": 2}, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "gemma": (
        "GemmaForCausalLM",
        _TEXT | {"num_key_value_heads": 1, "head_dim": 12},
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4}, ["c_attn"], "CAUSAL_LM"),
    "gpt_neox": ("GPTNeoXForCausalLM", _TEXT, ["query_key_value"], "CAUSAL_LM"),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": 96, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"word_embed_proj_dim": 48},
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "bert": ("BertForSequenceClassification", _TEXT | {"num_labels": 3}, ["query", "value"], "SEQ_CLS"),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4},
        ["q", "v"],
        "SEQ_2_SEQ_LM",
    ),
    "mixtral": ("MixtralForCausalLM", _MOE | {"num_local_experts": 4}, ["q_proj", "v_proj"], "CAUSAL_LM"),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        _MOE | {"num_experts": 4, "head_dim": 12, "decoder_sparse_step": 1},
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "vit": (
        "ViTForImageClassification",
        {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 16, "patch_size": 8, "num_labels": 3},
        ["q_proj", "v_proj"],
        None,
    ),
}
_OTHERS = {
    "gpt_oss": (
        "GptOssForCausalLM",
        # As many experts as rows of one, so that taking one for the other would show.
        _MOE | {"num_local_experts": 48, "head_dim": 12, "layer_types": ["full_attention"] * 2},
        ["q_proj", "v_proj"],
        "CAUSAL_LM",
    ),
    "dinov2": (
        "Dinov2Model",
        {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2}
        | {"use_swiglu_ffn": True, "image_size": 16, "patch_size": 8},
        ["q_proj"],
        None,
    ),
}


def build_model(architecture: str, dtype: torch.dtype = torch.float32):
    """A tiny model with random weights, the same each time."""
    name, values, _, _ = (ARCHITECTURES | _OTHERS)[architecture]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**values)).to(dtype)


def randomize_(model: torch.nn.Module, words=("lora_", "modules_to_save")) -> None:
    """LoRA starts with B = 0, with which no merge could go wrong."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(word in name for word in words):
            parameter.data = torch.empty_like(parameter).normal_(0, 0.2, generator=generator).abs_() + 0.01


def make_pair(directory: Path, architecture: str = "llama", dtype=torch.float32, shard_size="20KB", **lora):
    """A full model and an adapter for it on disk."""
    _, _, targets, task = (ARCHITECTURES | _OTHERS)[architecture]
    model = build_model(architecture, dtype)
    model.save_pretrained(directory / "full", max_shard_size=shard_size)
    lora = {"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": task} | lora
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, LoraConfig(**lora))
    randomize_(peft_model)
    peft_model.save_pretrained(directory / "adapter", save_embedding_layers=False)
    return directory / "full", directory / "adapter", type(model)


def save_adapter(model, peft_config, directory: Path, **saving):
    """Put an adapter that is not zero into a model, and save it as PEFT does. Returns the model with the adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, peft_config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)
        peft_model.save_pretrained(directory, **saving)
    return peft_model.eval()


def load_whole(model_class, directory: Path, **arguments):
    """Load a model, in float32, and check that nothing is missing or left over."""
    model, info = model_class.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **arguments)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def merge_with_peft(full: Path, adapter: Path, model_class, dtype="auto") -> dict[str, torch.Tensor]:
    """The weights after PEFT's own merge, which ours must equal."""
    model = model_class.from_pretrained(full, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def assert_equal_states(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], ulps: int = 0) -> None:
    """Compare weights bit for bit, or to within `ulps` units in the last place."""
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert result[name].dtype == tensor.dtype, name
        if not ulps:
            assert torch.equal(result[name], tensor), name
        else:
            a, b = result[name].float(), tensor.float()
            ulp = torch.finfo(tensor.dtype).eps * torch.maximum(a.abs(), b.abs()).clamp(min=2**-14)
            assert ((a - b).abs() <= ulps * ulp).all(), name


def make_others(directory: Path, full: Path, count: int) -> list[Path]:
    """More adapters for the model that [`make_pair`] made."""
    found = []
    for seed in range(count):
        model = transformers.LlamaForCausalLM.from_pretrained(full)
        torch.manual_seed(seed)
        peft_model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
        )
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        peft_model.save_pretrained(directory / f"other-{seed}")
        found.append(directory / f"other-{seed}")
    return found


def read_files(directory: Path) -> dict[str, bytes]:
    """All files below a directory, by relative path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# One of the keys in the adapters that [`make_pair`] makes.
LORA_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def change_tensor(file: Path, name: str, change) -> None:
    """Rewrite a safetensors file with `change(tensor)` in the place of one tensor; None removes it."""
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file({key: value for key, value in tensors.items() if value is not None}, file, metadata={"format": "pt"})


def change_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Rewrite a safetensors file with some other or more tensors."""
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


# --- Federations on disk and over Flower.
def make_llama_adapter(full_llama: Path, directory: Path, seed: int) -> Path:
    """An adapter on `full_llama` that is not zero."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(full_llama), config)
    torch.manual_seed(seed)
    tensors = {key: torch.randn_like(value) / 10 for key, value in copy_adapter(adapter_parameters(model)).items()}
    write_adapter(directory, tensors, config)
    return directory


def make_federation(output_dir: Path, adapter_dir: Path, **found: float) -> RoundStore:
    """The state of a federation of two clients after its first round, which `found` more values."""
    store, config = RoundStore(output_dir), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    settings = {"num_rounds": 5, "base_bits": 3, "adapter_bits": 2, "broadcast": "every_round", "max_steps": -1}
    store.create(
        {"federation_id": "f0", "base_fingerprint": "ab" * 32, "clients": {"a": 3, "b": 1}, "config": settings}
    )
    adapter = read_adapter(adapter_dir)[0]
    for number, (proxy, server) in enumerate([(0.4, 0.5), (0.8, 0.7)]):
        clients = {"a": {"num_examples": 3, "loss": 2.0}, "b": {"num_examples": 1, "loss": 4.0}} if number else {}
        record = {"round": number, "clients": clients, "rejected": {}, "seconds": 2.5 * number}
        record |= {"bytes_down": 2000 * number, "bytes_up": 3000 * number}
        record |= found if number else {}
        record["metrics"] = {"proxy": {"eval_accuracy": proxy}, "server": {"eval_accuracy": server}}
        store.commit(number, adapter, config, {}, record)
    return store


def read_table(text: str) -> list[list[str]]:
    """The cells of the lines of Markdown tables."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def assert_fails_in_one_line(result: tuple[int, str, str], text: str) -> None:
    """Check exit code, standard output and standard error of a command that can't do what it is told."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("fedlpp-hf: ")]
    assert code == 2 and out == "" and len(lines) == 1
    assert lines[0].startswith("fedlpp-hf: error: ") and text in lines[0] and "Traceback" not in err


FINGERPRINT = "a" * 64  # of a base that is only a manifest


CLIENTS = [f"site-{number}" for number in range(3)]


def find_free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_in_process(config, rows, output_dir, failures=(), flags=(), clients=CLIENTS):
    """The federation of `config` with all clients in this process; `failures` are (round, client)."""
    datasets = {client: load_rows(rows / f"{client}.jsonl") for client in clients}
    flags = ["--output_dir", str(output_dir), *flags]
    trainer, _ = load_trainer(config, flags, model=None, train_dataset=datasets)

    def train(tasks):
        for task in tasks:
            failed = (task.round, task.client_id) in failures
            yield ClientFailure(task.client_id, "as planned") if failed else trainer.train_client(task)

    trainer.train_remotely(train, {client: len(dataset) for client, dataset in datasets.items()})
    if trainer.owner is not None:
        trainer.owner.close()
    return read_adapter(output_dir)[0]
