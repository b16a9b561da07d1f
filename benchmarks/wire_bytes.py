# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What crosses the wire: per client and round, and once for the base, in bytes of the real messages and files.

    python -m benchmarks.wire_bytes

The adapter is LoRA of rank 8 on all linear layers of a Llama of the size of Llama 3.2 1B, of normal random values (how many
bytes the positions of a sparse update take depends on where its largest values are). Ratios are to federated averaging of
the same adapter in float32, and in bfloat16, which sends all of it both ways. The base is that of the 22 M encoder of the
demo; with each its share of the float32 model, and its bits per code: packed, as `pack_base` sends them (Huffman-coded
where that pays), the entropy of single codes, and what zlib and lzma make of the packed ones.
"""

import argparse
import json
import lzma
import math
import tempfile
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.encoder import find_encoder
from fedlpp_hf import FederatedConfig, export_base
from fedlpp_hf.base.huffman import shrink_codes
from fedlpp_hf.base.packing import pack_base
from fedlpp_hf.base.quantize import unpack_nibbles
from fedlpp_hf.config.yaml_files import read_yaml
from fedlpp_hf.tensors.adapters import adapter_parameters
from fedlpp_hf.tensors.codebooks import codebook, packed_size
from fedlpp_hf.tensors.packing import pack_codes
from fedlpp_hf.tensors.quantization import quantize_tensors, round_to_levels
from fedlpp_hf.wire.compression import compress_update
from fedlpp_hf.wire.messages import ClientTask, ClientUpdate


CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
PRESETS = ("fedlpp", "balanced", "strict")
DOWN = [{"adapter_bits": bits, "adapter_block_size": size} for bits in (4, 3, 2) for size in (64, 256)]
UP: list[dict[str, Any]] = [{"update_bits": bits} for bits in (8, 4, 3, 2)]
UP += [{"update_bits": 4, "update_density": density} for density in (0.1, 0.05)]
LLAMA_1B = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=True,
)  # fmt: skip


def make_adapter() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA_1B)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(t.shape, generator=generator) * 0.01 for key, t in adapter_parameters(model).items()}


def read_preset(name: str) -> FederatedConfig:
    values, known = read_yaml(CONFIGS / f"{name}.yaml"), {entry.name for entry in fields(FederatedConfig)}
    return FederatedConfig(**{key: value for key, value in values.items() if key in known})


def measure_round(adapter: dict[str, torch.Tensor], args: FederatedConfig) -> tuple[int, int]:
    """Bytes down and up for one client in one round in which the adapter is broadcast, if it ever is."""
    proxy: Any = None
    if args.broadcast != "never":
        full = args.adapter_bits == 32
        proxy = adapter if full else quantize_tensors(adapter, args.adapter_bits, args.adapter_block_size)
    payload, _ = compress_update(adapter, args.update_bits, args.adapter_block_size, args.update_density)
    return measure_messages(proxy, payload)


def measure_messages(proxy: Any, delta: Any) -> tuple[int, int]:
    task = ClientTask("0" * 16, 1, 10, "client-0", 0, "0" * 64, proxy)
    metrics = {"train_loss": 1.0, "train_runtime": 1.0}
    update = ClientUpdate("0" * 16, 1, "client-0", "0" * 64, 100, delta, metrics)
    return len(task.to_bytes()), len(update.to_bytes())


def measure_rounds(folder: str) -> list[dict[str, Any]]:
    adapter = make_adapter()
    half = {key: tensor.bfloat16() for key, tensor in adapter.items()}

    def config(**settings: Any) -> FederatedConfig:
        return FederatedConfig(folder, use_cpu=True, **settings)

    rows = {"FedAvg, float32": measure_messages(adapter, adapter), "FedAvg, bfloat16": measure_messages(half, half)}
    rows |= {f"preset {name}": measure_round(adapter, read_preset(name)) for name in PRESETS}
    for settings in DOWN:
        what = f"proxy of {settings['adapter_bits']} bits, blocks of {settings['adapter_block_size']}"
        rows[what] = measure_round(adapter, config(**settings))
    for settings in UP:
        density = settings.get("update_density", 1)
        what = f"+ update of {settings['update_bits']} bits" + (f", {density:.0%} kept" if density < 1 else "")
        rows[what] = measure_round(adapter, config(adapter_bits=4, adapter_block_size=256, **settings))
    full, half_total = (sum(rows[f"FedAvg, {dtype}"]) for dtype in ("float32", "bfloat16"))
    return [
        {
            "what": what,
            "down": down,
            "up": up,
            "of_float32": (down + up) / full,
            "of_bfloat16": (down + up) / half_total,
        }
        for what, (down, up) in rows.items()
    ]


def measure_base(folder: str) -> list[dict[str, Any]]:
    encoder = find_encoder()
    whole = (encoder / "model.safetensors").stat().st_size
    rows = []
    for bits in (4, 3, 2, 1):
        for double_quant in (False, True):
            base = Path(folder, f"base-{bits}-{double_quant}")
            manifest = export_base(encoder, base, bits=bits, double_quant=double_quant)
            size = pack_base(base, base.with_suffix(".packed"))
            linears = [entry for entry in manifest["tensors"] if entry["kind"] == "linear4bit"]
            row = {
                "bits": bits,
                "double_quant": double_quant,
                "bytes": size,
                "of_float32": size / whole,
                **measure_linears(base.with_suffix(".packed"), linears),
            }
            rows.append(row | ({} if double_quant else measure_entropy(base, linears, bits)))
    return rows


def measure_linears(packed: Path, linears: list[dict[str, Any]]) -> dict[str, float]:
    """Bits that the packed file has for each weight of the Linears: in all, and for its code alone."""
    tensors = load_file(packed)
    count = sum(math.prod(entry["shape"]) for entry in linears)
    names = {entry["name"] for entry in linears}
    # Scales, nested scales and their state lie under the weight's name.
    sizes = {
        key: value.numel()
        for key, value in tensors.items()
        if {key, key.rpartition(".weight.")[0] + ".weight"} & names
    }
    codes = sum(sizes[name] for name in names)
    return {"bits_per_linear_weight": sum(sizes.values()) * 8 / count, "bits_per_code": codes * 8 / count}


def measure_entropy(base: Path, linears: list[dict[str, Any]], bits: int) -> dict[str, float]:
    """Bits per code of the Linears' weights before they are shrunk, their entropy, and what zlib and lzma make of them."""
    with safe_open(base / "model.safetensors", "pt") as shard:
        nibbles = torch.cat([unpack_nibbles(shard.get_tensor(e["name"]), e["shape"]) for e in linears])
    _, codes, counts = nibbles.unique(return_inverse=True, return_counts=True)
    shares = counts / counts.sum()
    data = pack_codes(codes.to(torch.uint8), bits).numpy().tobytes()
    return {
        "packed": len(data) * 8 / len(codes),
        "entropy": float(-(shares * shares.log2()).sum()),
        "zlib": len(zlib.compress(data)) * 8 / len(codes),
        "lzma": len(lzma.compress(data, preset=1)) * 8 / len(codes),
    }


def measure_proxies() -> list[dict[str, Any]]:
    """What the base's entropy coder would make of a proxy's codes: LoRA's A is uniform at the start, and B becomes normal."""
    generator = torch.Generator().manual_seed(0)
    factors = {"A": torch.rand(2**20, generator=generator) - 0.5, "B": torch.randn(2**20, generator=generator)}
    rows = []
    for bits in (4, 3, 2):
        row: dict[str, Any] = {"bits": bits}
        for name, values in factors.items():
            codes = round_to_levels(values, codebook(bits), 256)[0]
            row[name] = len(shrink_codes(codes, bits)) / packed_size(bits, len(codes))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print results as JSON lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wire-bytes-") as folder:
        rounds, bases, proxies = measure_rounds(folder), measure_base(folder), measure_proxies()
    if options.json:
        for row in rounds + bases + proxies:
            print(json.dumps(row))
        return
    print("| per client and round | MB down | MB up | of float32 | of bfloat16 |\n|---|---|---|---|---|")
    for row in rounds:
        sizes = f"{row['down'] / 1e6:.3f} | {row['up'] / 1e6:.3f}"
        print(f"| {row['what']} | {sizes} | {row['of_float32']:.1%} | {row['of_bfloat16']:.1%} |")
    print("\n| base, packed | MB | of float32 | bits per Linear weight | with double_quant |\n|---|---|---|---|---|")
    for plain, double in zip(bases[::2], bases[1::2], strict=True):
        sizes = [f"{row['bytes'] / 1e6:.2f}" for row in (plain, double)]
        weights = [f"{row['bits_per_linear_weight']:.2f}" for row in (plain, double)]
        print(
            f"| {plain['bits']} bits | {sizes[0]} | {plain['of_float32']:.1%} | {weights[0]} | {sizes[1]} MB, {weights[1]} |"
        )
    print("\n| bits per code | packed | as sent | entropy | zlib | lzma |\n|---|---|---|---|---|---|")
    for row in bases[::2]:
        cells = " | ".join(f"{row[key]:.2f}" for key in ("packed", "bits_per_code", "entropy", "zlib", "lzma"))
        print(f"| {row['bits']} bits | {cells} |")
    print("\n| a proxy's codes, if they were Huffman-coded | A | B |\n|---|---|---|")
    for row in proxies:
        print(f"| {row['bits']} bits | {row['A']:.1%} | {row['B']:.1%} |")


if __name__ == "__main__":
    main()
