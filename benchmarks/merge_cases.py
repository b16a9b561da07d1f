# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What becomes of kinds of adapters and of damaged inputs, when this library and others merge them into a full model.

    python -m benchmarks.merge_cases [--axolotl DIRECTORY]

Tiny models of random weights in float32, on a CPU. A merge is `right` if the merged directory, loaded anew, answers like the
full model with the adapter beside it (PEFT, unmerged; relative difference below 1e-4). Else it is `wrong` if nothing was
said, or `error`, with the first words of the message. For damaged inputs an error is what is wanted.

`loop` is the loop over shards that people write: W + s·B·A for each weight with factors of its name. `axolotl` is
`merge_lora_sharded_efficient` of an unpacked wheel (`pip download --no-deps axolotl`, then unzip it).
"""

import argparse
import gc
import importlib.util
import logging
import shutil
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedlpp_hf import merge_adapter
from fedlpp_hf.tensors.adapters import read_adapter
from fedlpp_hf.tensors.lora import lora_factors


SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = transformers.LlamaConfig(intermediate_size=96, num_key_value_heads=2, **SIZES)
TIED = transformers.LlamaConfig(intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=True, **SIZES)
GPT2 = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4)
EXPERTS = transformers.Qwen3MoeConfig(
    intermediate_size=96, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, num_key_value_heads=2, **SIZES
)  # fmt: skip
QV = ["q_proj", "v_proj"]
# Name: full model, options of the LoRA.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA on query and value": (LLAMA, {"target_modules": QV}),
    "all Linears, with rank and alpha patterns": (
        LLAMA, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    ),
    "rsLoRA": (LLAMA, {"target_modules": QV, "use_rslora": True}),
    "DoRA": (LLAMA, {"target_modules": QV, "use_dora": True}),
    "`Conv1D` (GPT-2)": (GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "trained biases (`bias=\"lora_only\"`, GPT-2)": (
        GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"},
    ),
    "`lora_bias` (GPT-2)": (GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    "LoRA on the embedding": (LLAMA, {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on a head that is tied to the embedding": (TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "`modules_to_save`": (LLAMA, {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "a new classifier in `modules_to_save`": (LLAMA, {"target_modules": QV, "task_type": "SEQ_CLS"}),
    "new tokens, with embeddings and head": (LLAMA, {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "experts (`target_parameters`, Qwen3-MoE)": (
        EXPERTS, {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]},
    ),
}  # fmt: skip
DAMAGES = ("an adapter of another architecture", "an adapter with NaN", "a truncated shard", "a full model in 4 bits")


def write_pair(directory: Path, config: Any, options: dict[str, Any], new_tokens: int = 0) -> tuple[Path, Path, Any]:
    """Write a full model and an adapter whose factors are all random; the class that the adapter is for."""
    torch.manual_seed(0)
    model_class: Any = transformers.AutoModelForCausalLM
    model_class.from_config(config).save_pretrained(directory / "full", max_shard_size="60KB")
    if options.get("task_type") == "SEQ_CLS":
        model_class = transformers.AutoModelForSequenceClassification
    model = model_class.from_pretrained(directory / "full")
    if new_tokens:
        model.resize_token_embeddings(config.vocab_size + new_tokens)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options))
    for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
        parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(directory / "adapter")
    return directory / "full", directory / "adapter", model_class


def answer(model: Any) -> torch.Tensor:
    """The model's logits for fixed tokens."""
    model.config.pad_token_id = 0
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 33).view(2, 16), use_cache=False).logits


def load_adapted(full: Path, adapter: Path, model_class: Any, new_tokens: int = 0) -> PeftModel:
    """The full model with the adapter beside it."""
    model = model_class.from_pretrained(full)
    if new_tokens:
        model.resize_token_embeddings(model.config.vocab_size + new_tokens)
    return PeftModel.from_pretrained(model, adapter)


def merge_with_peft(full: Path, adapter: Path, out: Path, model_class: Any) -> None:
    """As PEFT's documentation does it."""
    model = PeftModel.from_pretrained(model_class.from_pretrained(full), adapter)
    model.merge_and_unload().save_pretrained(out)


def merge_in_a_loop(full: Path, adapter: Path, out: Path, model_class: Any) -> None:
    """Shard by shard, by name."""
    tensors, config = read_adapter(adapter)
    factors = lora_factors(tensors, config)
    shutil.copytree(full, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for shard in sorted(full.glob("*.safetensors")):
        merged = {}
        with safe_open(shard, "pt") as source:
            for name in source.keys():  # noqa: SIM118 (a safe_open is no dict)
                weight, found = source.get_tensor(name), factors.get(name.removesuffix(".weight"))
                if found:
                    weight = weight + tensors[found.key_b] @ tensors[found.key_a] * found.scale
                merged[name] = weight
        save_file(merged, out / shard.name, metadata={"format": "pt"})


def merge_here(full: Path, adapter: Path, out: Path, model_class: Any) -> None:
    """This library."""
    merge_adapter(full, adapter, out, model_class=model_class)


def load_axolotl(directory: Path) -> Callable[..., None]:
    """axolotl's function alone, without the packages that the rest of axolotl imports."""
    stub: Any = types.ModuleType("axolotl.utils.logging")
    stub.get_logger = logging.getLogger
    sys.modules.update({"axolotl": types.ModuleType("axolotl"), "axolotl.utils": types.ModuleType("axolotl.utils")})
    sys.modules["axolotl.utils.logging"] = stub
    path = directory / "axolotl" / "cli" / "utils" / "lora_merge.py"
    spec = importlib.util.spec_from_file_location("axolotl_lora_merge", path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda full, adapter, out, model_class: module.merge_lora_sharded_efficient(full, adapter, out)


def try_merge(merge: Callable[..., None], pair: tuple[Path, Path, Any], out: Path, wanted: torch.Tensor | None) -> str:
    """One cell of the table: `right`, `wrong`, `error`, or for damaged inputs `passed`."""
    full, adapter, model_class = pair
    try:
        merge(full, adapter, out, model_class)
    except Exception as error:
        return f"error: {type(error).__name__}: {' '.join(str(error).split())[:70]}"
    if wanted is None:
        return "passed"
    try:
        found = answer(model_class.from_pretrained(out))
    except Exception as error:
        return f"does not load: {type(error).__name__}: {' '.join(str(error).split())[:70]}"
    if found.shape != wanted.shape:
        return f"wrong: logits of shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    difference = float((found - wanted).norm() / wanted.norm())
    return "right" if difference < 1e-4 else f"wrong by {difference:.1%}"


def damage(kind: str, directory: Path) -> tuple[Path, Path, Any]:
    """A pair that must not be merged."""
    full, adapter, model_class = write_pair(directory, *CASES["LoRA on query and value"])
    weights = adapter / "adapter_model.safetensors"
    if kind == DAMAGES[0]:
        adapter = write_pair(directory / "other", *CASES["`Conv1D` (GPT-2)"])[1]
    elif kind == DAMAGES[1]:
        tensors = load_file(weights)
        tensors[min(tensors)][0, 0] = float("nan")
        save_file(tensors, weights)
    elif kind == DAMAGES[2]:
        shard = min(full.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1000])
    else:
        quantized = model_class.from_pretrained(
            full, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        )
        quantized.save_pretrained(directory / "full-4bit")
        full = directory / "full-4bit"
    return full, adapter, model_class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axolotl", type=Path, help="directory of an unpacked wheel of axolotl")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    methods = {"fedlpp_hf": merge_here, "PEFT": merge_with_peft, "loop": merge_in_a_loop}
    if arguments.axolotl:
        methods["axolotl"] = load_axolotl(arguments.axolotl)
    print("| | " + " | ".join(methods) + " |\n|" + "---|" * (len(methods) + 1), flush=True)
    for name in [*CASES, *DAMAGES]:
        with tempfile.TemporaryDirectory() as folder:
            directory, wanted = Path(folder), None
            if name in CASES:
                new_tokens = 8 if "new tokens" in name else 0
                pair = write_pair(directory, *CASES[name], new_tokens)
                wanted = answer(load_adapted(*pair, new_tokens))
            else:
                pair = damage(name, directory)
            cells = [try_merge(merge, pair, directory / f"out-{key}", wanted) for key, merge in methods.items()]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
