# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The quantized base that clients hold: export it from the full model tensor by tensor, load it, say what is in it."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.functional import QuantState, get_4bit_type, int8_vectorwise_quant, quantize_blockwise
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from .checkpoints import Checkpoint, plan_tensors
from .quantization import (
    FULL_PRECISION,
    check_bits,
    dequantize,
    nf4_subset,
    packed_size,
    quantize,
    round_to_levels,
)


BASE_MANIFEST = "base_manifest.json"
FORMAT_VERSION = 1
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those of bitsandbytes' 4-bit kernels
_NESTED_BLOCK_SIZE = 256
# Copied next to the weights where the full model has them. A README names its owner; it stays.
_COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
_OWNERS_KEYS = {
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "auto_map",
    "base_model_name_or_path",
    "tokenizer_file",
}


def export_base(
    full_model: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    bits: int | str = 4,
    block_size: int = 64,
    double_quant: bool = False,
    embedding_bits: int | str = 4,
    skip_modules: Sequence[str] | None = None,
    model_class: Any = None,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    max_shard_size: int = 4 * 10**9,
) -> dict[str, Any]:
    """Quantize the full model into a directory that `from_pretrained` loads and that clients may have.

    One tensor is in memory at a time, and one shard of at most `max_shard_size` bytes. Every `nn.Linear` and `Conv1D`
    outside `skip_modules` becomes a bitsandbytes weight of `bits` bits (1 to 4: NF4 codes or a subset of them, in blocks
    of `block_size`; 8: int8 rows). Every other tensor of two or more dimensions keeps its dtype but only
    `2**embedding_bits` values per block (experts: `2**bits`); `embedding_bits=32` ships them as they are. `skip_modules`
    defaults to the output embeddings and the task heads. `model_class` defaults to the one the configuration names.

    Returns the manifest, which is also written as `base_manifest.json`.

    Raises:
        ValueError: for arguments, checkpoints or values that can't be quantized; nothing is left in `output_dir`.
    """
    bits = check_bits(bits)
    embedding_bits = FULL_PRECISION if embedding_bits in (FULL_PRECISION, "32") else check_bits(embedding_bits)
    if block_size not in _BLOCK_SIZES:
        raise ValueError(f"block_size={block_size}; bitsandbytes' 4-bit kernels know {_BLOCK_SIZES}.")
    if double_quant and bits == 8:
        raise ValueError("double_quant=True compresses 4-bit scales; it has no meaning with bits=8. Leave it out.")
    output_dir = Path(output_dir)
    _check_output(output_dir, overwrite)

    with Checkpoint(full_model, revision=revision, token=token) as checkpoint:
        config = AutoConfig.from_pretrained(checkpoint.directory)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"`{full_model}` is quantized already; a base is exported from full precision.")
        model = build_meta_model(config, model_class)
        plan = plan_tensors(model, checkpoint.names)
        skip = default_skip_modules(model) if skip_modules is None else list(skip_modules)
        _check_missing(model, plan.missing, skip)
        config.architectures = [type(model).__name__]
        config.quantization_config = _bnb_config(bits, double_quant, skip, config.dtype or checkpoint.dtype)
        converted = _converted_modules(build_meta_model(config, type(model)), config.quantization_config)
        if skip_modules is None:
            _check_converted(model, converted, skip)

        partial = output_dir.parent / f".{output_dir.name}.{os.getpid()}.partial"
        partial.mkdir(parents=True)
        try:
            writer = _ShardWriter(partial, max_shard_size)
            for name, tensor in plan.read(checkpoint, model):
                entry, tensors = _quantize(name, tensor, converted, bits, block_size, double_quant, embedding_bits)
                writer.write(entry, tensors)
            writer.close()
            _write_companions(checkpoint, config, partial)
            manifest = {
                "format_version": FORMAT_VERSION,
                "bits": bits,
                "block_size": block_size,
                "double_quant": double_quant,
                "embedding_bits": embedding_bits,
                "skip_modules": sorted(skip),
                "architecture": type(model).__name__,
                "full_precision_linears": _full_precision_linears(model, writer.entries),
                "initialized_by_clients": plan.missing,
                "left_out": plan.left_out,
                "tensors": writer.entries,
                "totals": _totals(writer.entries),
            }
            _seal(partial, manifest)
            _publish(partial, output_dir)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return manifest


def build_meta_model(config: Any, model_class: Any = None) -> PreTrainedModel:
    """The model's modules without memory for their weights.

    Raises:
        ValueError: if transformers has no class of that name.
    """
    if model_class is None:
        names = config.architectures or []
        model_class = getattr(transformers, names[0], None) if names else None
        if model_class is None:
            raise ValueError(
                f"The configuration names {names or 'no architecture'}, which transformers "
                f"{transformers.__version__} does not have; pass `model_class` (code from the Hub is not run)."
            )
    build = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        return build(config)


def default_skip_modules(model: PreTrainedModel) -> list[str]:
    """Modules that stay trainable floats: the output embeddings and the task heads, which are the children of the model
    outside its backbone (`classifier`, `score`, `qa_outputs`, …)."""
    output = model.get_output_embeddings()
    skip = {name for name, module in model.named_modules() if module is output}
    if model.base_model is not model:
        skip |= {name for name, child in model.named_children() if child is not model.base_model and _linears(child)}
    return sorted(skip)


def _linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _bnb_config(bits: int, double_quant: bool, skip: list[str], dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=torch.uint8,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def _converted_modules(model: PreTrainedModel, quantization_config: BitsAndBytesConfig) -> dict[str, bool]:
    """The modules that transformers will load as bitsandbytes weights, and whether they were a `Conv1D`.

    Asked of transformers itself, because its rules match suffixes and regular expressions.
    """
    AutoHfQuantizer.from_config(quantization_config, pre_quantized=True).preprocess_model(model, device_map=None)
    return {
        name: issubclass(module.source_cls, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }


def _check_converted(model: PreTrainedModel, converted: dict[str, bool], skip: list[str]) -> None:
    kept = _linears(model) - set(converted)
    by_intent = {name for name in kept for module in skip if name == module or name.startswith(f"{module}.")}
    fp32 = tuple(model._keep_in_fp32_modules or ())
    stray = sorted(name for name in kept - by_intent if not any(part in fp32 for part in name.split(".")))
    if stray:
        raise ValueError(
            f"transformers would not quantize `{stray[0]}` ({len(stray)} in all), as it ends like one of {skip}. Pass "
            "`skip_modules` with longer names."
        )


def _check_missing(model: PreTrainedModel, missing: list[str], skip: list[str]) -> None:
    backbone = {f"{name}." for name, child in model.named_children() if child is model.base_model} or {""}
    lost = [n for n in missing if n.startswith(tuple(backbone)) and not n.startswith(tuple(f"{s}." for s in skip))]
    if lost:
        raise ValueError(
            f"The checkpoint has no `{lost[0]}` ({len(lost)} missing) for {type(model).__name__}. Is it complete, and of "
            "this `model_class`? Name the module in `skip_modules` if clients are to initialize it."
        )


def _quantize(
    name: str,
    tensor: torch.Tensor,
    converted: dict[str, bool],
    bits: int,
    block_size: int,
    double_quant: bool,
    embedding_bits: int,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    module, _, leaf = name.rpartition(".")
    if leaf == "weight" and module in converted:
        weight = tensor.T.contiguous() if converted[module] else tensor
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"`{name}` is of {weight.dtype}; expected float32, float16 or bfloat16.")
        kind = "linear8bit" if bits == 8 else "linear4bit"
        tensors = (
            _quantize_int8(name, weight) if bits == 8 else quantize_nf4(name, weight, bits, block_size, double_quant)
        )
        scales = [t for key, t in tensors.items() if key.endswith(("absmax", "SCB"))]
        information = packed_size(bits, weight.numel()) + sum(t.nbytes for t in scales)
    elif tensor.is_floating_point() and tensor.dim() > 1 and embedding_bits != FULL_PRECISION:
        # Experts are the bulk of their model, and no nn.Linear: they get the bits of the others.
        quantized = quantize(tensor, bits if ".experts." in name else embedding_bits, block_size, name=name)
        kind, information = "codebook", quantized.codes.nbytes + quantized.scales.numel() * tensor.element_size()
        tensors = {name: dequantize(quantized, tensor.dtype)}
    else:
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{name}` has values that are NaN or infinite. Is the checkpoint damaged?")
        kind, information, tensors = "full_precision", tensor.nbytes, {name: tensor}
    entry = {
        "name": name,
        "kind": kind,
        "shape": list(tensor.shape),
        "dtype": str(tensors[name].dtype).removeprefix("torch."),
        "information_bytes": information,
        "information_bits": information * 8 / max(tensor.numel(), 1),
        "bytes": sum(t.nbytes for t in tensors.values()),
    }
    return entry, tensors


def quantize_nf4(
    name: str, weight: torch.Tensor, bits: int, block_size: int, double_quant: bool
) -> dict[str, torch.Tensor]:
    """The checkpoint entries of a bitsandbytes `Linear4bit` whose codes carry `bits` bits (1 to 4) of information.

    `weight` `(out, in)`. At 4 bits they are those of `bitsandbytes.functional.quantize_4bit`, bit for bit.
    """
    code = get_4bit_type("nf4", device="cpu")
    subset = torch.tensor(nf4_subset(bits), dtype=torch.uint8)
    indices, absmax = round_to_levels(weight, code[subset.int()], block_size, name=name)
    if weight.numel() % block_size:
        absmax[-1].clamp_(min=1e-38)  # bitsandbytes clamps the scale of the short last block, and of no other
    state = QuantState(
        absmax, shape=weight.shape, code=code, blocksize=block_size, quant_type="nf4", dtype=weight.dtype
    )
    if double_quant:
        state.offset = absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(absmax - state.offset, blocksize=_NESTED_BLOCK_SIZE)
        state.nested = True
    entries = {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {name: pack_nibbles(subset[indices.int()])} | entries


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes per byte, the first in the high nibble, as bitsandbytes has them: `(bytes, 1)` uint8."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_tensor([7])])  # bitsandbytes pads with the code of 0
    return (codes[::2] << 4 | codes[1::2]).unsqueeze(1)


def _quantize_int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    half = weight.half()  # as bitsandbytes does
    if not torch.isfinite(half).all():
        raise ValueError(f"`{name}` has values that are NaN, infinite or beyond float16, which int8 rows start from.")
    codes, scales, _ = int8_vectorwise_quant(half)
    module = name.removesuffix("weight")
    return {name: codes, f"{module}SCB": scales, f"{module}weight_format": torch.tensor(0, dtype=torch.uint8)}


def _full_precision_linears(model: PreTrainedModel, entries: list[dict[str, Any]]) -> list[str]:
    linears = _linears(model)
    return [
        e["name"] for e in entries if e["kind"] == "full_precision" and e["name"].removesuffix(".weight") in linears
    ]


def _totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    parameters = sum(math.prod(e["shape"]) for e in entries)
    information = sum(e["information_bytes"] for e in entries)
    return {
        "parameters": parameters,
        "information_bytes": information,
        "information_bits_per_parameter": information * 8 / max(parameters, 1),
        "bytes": sum(e["bytes"] for e in entries),
        "full_precision_bytes": sum(e["bytes"] for e in entries if e["kind"] == "full_precision"),
    }


class _ShardWriter:
    """Writes tensors into safetensors files of bounded size and remembers what went where."""

    def __init__(self, directory: Path, max_shard_size: int):
        self.directory, self.max_shard_size = directory, max_shard_size
        self.entries: list[dict[str, Any]] = []
        self.shards: list[list[str]] = []
        self.pending: dict[str, torch.Tensor] = {}

    def write(self, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if self.pending and sum(t.nbytes for t in self.pending.values()) + entry["bytes"] > self.max_shard_size:
            self.flush()
        self.entries.append(entry)
        self.pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}

    def flush(self) -> None:
        self.shards.append(sorted(self.pending))
        save_file(self.pending, self.directory / f"shard-{len(self.shards)}", metadata={"format": "pt"})
        self.pending = {}

    def close(self) -> None:
        self.flush()
        if len(self.shards) == 1:
            (self.directory / "shard-1").rename(self.directory / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self.shards, 1):
            file = f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            (self.directory / f"shard-{number}").rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(e["bytes"] for e in self.entries)}, "weight_map": weight_map}
        _write_json(self.directory / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_companions(checkpoint: Checkpoint, config: Any, directory: Path) -> None:
    secrets = [str(checkpoint.directory), str(checkpoint.directory.resolve()), *checkpoint.secrets]
    _write_json(directory / "config.json", _scrub(config.to_dict(), secrets))
    for name in _COMPANIONS:
        source = checkpoint.directory / name
        if not source.is_file():
            continue
        if name.endswith("config.json"):
            _write_json(directory / name, _scrub(json.loads(source.read_text(encoding="utf-8")), secrets))
        else:
            shutil.copyfile(source, directory / name)


def _scrub(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: _scrub(item, secrets)
            for key, item in value.items()
            if key not in _OWNERS_KEYS and not (isinstance(item, str) and any(s in item for s in secrets))
        }
    return [_scrub(item, secrets) for item in value] if isinstance(value, list) else value


def _check_output(output_dir: Path, overwrite: bool) -> None:
    if not output_dir.exists():
        return
    if not overwrite:
        raise ValueError(f"`{output_dir}` exists; pass overwrite=True to replace the base in it.")
    if not (output_dir / BASE_MANIFEST).is_file():
        raise ValueError(f"`{output_dir}` has no `{BASE_MANIFEST}`, so it is not a base; it is not overwritten.")


def _publish(partial: Path, output_dir: Path) -> None:
    old = partial.with_suffix(".old")
    if output_dir.exists():
        output_dir.rename(old)
    partial.rename(output_dir)
    shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.iterdir()) if path.is_file() and path.name != BASE_MANIFEST)


def _seal(directory: Path, manifest: dict[str, Any]) -> None:
    manifest["files"] = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in _files(directory)}
    manifest["fingerprint"] = _fingerprint(manifest)
    _write_json(directory / BASE_MANIFEST, manifest)


def _fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 over the names and digests of the files and the parameters of the quantization."""
    keys = ("format_version", "bits", "block_size", "double_quant", "embedding_bits", "skip_modules", "architecture")
    content = {key: manifest[key] for key in keys} | {"files": {n: f["sha256"] for n, f in manifest["files"].items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_base(
    base_dir: str | os.PathLike,
    model_class: Any = None,
    *,
    verify: bool = True,
    compute_dtype: torch.dtype | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a base with plain `from_pretrained`, after checking its files against the manifest.

    `model_class` (a model or an Auto class) defaults to the one it was exported as; heads that the base does not have are
    initialized as floats. `compute_dtype` is what products are computed in: by default the full model's dtype, and
    float32 on a CPU, where the other dtypes are slow and inexact; floats are then loaded as float32 too, unless `dtype`
    says otherwise. `kwargs` go to `from_pretrained`.

    Raises:
        ValueError: if the directory is no base, is not what its manifest says, or does not fit `model_class`.
    """
    manifest = check_base(base_dir) if verify else read_manifest(base_dir)
    dtype = kwargs.pop("dtype", None)
    config, kwargs = AutoConfig.from_pretrained(base_dir, return_unused_kwargs=True, **kwargs)
    on_cpu = str(device_map.get("") if isinstance(device_map, dict) else device_map or _default_device()) == "cpu"
    if on_cpu:
        compute_dtype, dtype = compute_dtype or torch.float32, dtype or torch.float32
    if compute_dtype is not None:
        config.quantization_config["bnb_4bit_compute_dtype"] = str(compute_dtype).removeprefix("torch.")
    model_class = model_class or getattr(transformers, manifest["architecture"])
    meta = build_meta_model(config, model_class)
    if type(meta).__name__ != manifest["architecture"]:  # another class may have heads that the export did not see
        skip = config.quantization_config["llm_int8_skip_modules"]
        skip += [name for name in default_skip_modules(meta) if name not in skip]
    model, info = model_class.from_pretrained(
        base_dir, config=config, dtype=dtype or "auto", device_map=device_map, output_loading_info=True, **kwargs
    )
    _check_missing(meta, [n for n in info["missing_keys"] if n not in manifest["initialized_by_clients"]], [])
    keep_layout_(model)
    model.base_fingerprint = manifest["fingerprint"]
    return model


def _default_device() -> str:
    """Where transformers puts a bitsandbytes model when it is not told."""
    return "accelerator" if torch.accelerator.is_available() else "cpu"


def keep_layout_(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights in place.

    On a CPU with AVX512-bf16, the first forward in eval mode repacks each weight and rounds its scales to bfloat16, for
    good; it fails on sizes that are no multiples of 32, and gradients stop there when training goes on.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def read_manifest(base_dir: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a base.

    Raises:
        ValueError: if there is none, or of another format.
    """
    path = Path(base_dir) / BASE_MANIFEST
    if not path.is_file():
        raise ValueError(
            f"`{base_dir}` has no `{BASE_MANIFEST}`; expected the directory of a quantized base. Clients may load nothing "
            f"else. The owner makes one with `export_base(full_model, output_dir)`."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"`{path}` can't be read ({error}); copy the base again.") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"`{path}` has format {version}; this version of fedlpp_hf reads {FORMAT_VERSION}.")
    return manifest


def check_base(base_dir: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a base whose files are all there, unchanged, and the only ones.

    Raises:
        ValueError: naming the file that is not as the manifest says.
    """
    base_dir, manifest = Path(base_dir), read_manifest(base_dir)
    if manifest["fingerprint"] != _fingerprint(manifest):
        raise ValueError(f"The manifest of `{base_dir}` does not match its own fingerprint; copy the base again.")
    present = {path.name for path in _files(base_dir) if path.name != "README.md" and path.name[0] != "."}
    extra = sorted(present - set(manifest["files"]))
    if extra:
        raise ValueError(f"`{base_dir}` has `{extra[0]}`, which its manifest does not list. Remove it.")
    for name, file in manifest["files"].items():
        if name not in present:
            raise ValueError(f"`{base_dir}` has no `{name}`; copy the base again.")
        if _sha256(base_dir / name) != file["sha256"]:
            raise ValueError(f"`{base_dir / name}` is not the exported file (other sha256); copy the base again.")
    return manifest


def base_fingerprint(base: str | os.PathLike | nn.Module) -> str:
    """The fingerprint that identifies a base, of its directory or of a model loaded from there.

    It does not look at the files or weights: for that there is [`check_base`].

    Raises:
        ValueError: if the model was not loaded from a base.
    """
    if not isinstance(base, nn.Module):
        return read_manifest(base)["fingerprint"]
    fingerprint = getattr(base, "base_fingerprint", None)
    return fingerprint or read_manifest(base.config._name_or_path)["fingerprint"]


def describe_base(base_dir: str | os.PathLike) -> dict[str, Any]:
    """The manifest, and what of the base is in full precision (`full_precision`, largest first)."""
    manifest = read_manifest(base_dir)
    exact = [entry for entry in manifest["tensors"] if entry["kind"] == "full_precision"]
    return manifest | {
        "full_precision": sorted(exact, key=lambda entry: -entry["bytes"]),
        "file_bytes": sum(file["bytes"] for file in manifest["files"].values()),
    }
