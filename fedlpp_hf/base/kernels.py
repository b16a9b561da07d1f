# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Guards against two defects of bitsandbytes 0.50 on CPUs with AVX-512."""

import threading
import warnings
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn

from .quantize import unpack_nibbles


_OPERATOR = "bitsandbytes::dequantize_4bit"
_lock = threading.Lock()
_libraries: list[torch.library.Library] = []  # an override lives as long as its library


def keep_layout_(model: nn.Module) -> None:
    """Make bitsandbytes' 4-bit layers compute on a CPU what their codes say, and leave the codes as they are.

    On a CPU with AVX512-bf16, a layer's first forward in eval mode repacks its weight in place: its scales are rounded to
    bfloat16 for good, sizes that are not multiples of 32 fail, and later training passes no gradient through the layer.
    That is turned off. The second defect is [`fix_kernel`]'s. Without such layers or such a CPU, nothing happens.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    if any(layer.weight.device.type == "cpu" for layer in layers):
        fix_kernel()


def fix_kernel() -> None:
    """Make `dequantize_4bit` right on the CPU for rows that are not a whole number of blocks.

    Where the row length is a multiple of 16 but not of the block size (352 and 64, 48 and 32), the AVX-512 kernel takes
    the scales of other blocks: only a few percent of the values are right. The replacement gives it the same codes as rows
    of one block each, which it reads correctly. Other lengths, and kernels without the defect, stay as they are.

    Raises:
        RuntimeError: if the kernel is wrong and torch is too old to replace it.
    """
    with _lock:
        if _libraries or _is_right():
            return
        if not hasattr(torch.library, "get_kernel"):
            raise RuntimeError(
                "bitsandbytes computes wrong 4-bit products on this CPU for rows that are not whole blocks, and torch "
                f"{torch.__version__} can't replace its kernel. Upgrade torch to 2.9 or later, or use a GPU."
            )
        original = torch.library.get_kernel(_OPERATOR, "CPU")

        def dequantize(
            keys: Any, A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: Any, dtype: Any
        ) -> torch.Tensor:
            count = torch.Size(shape).numel()
            if shape[-1] % 16 or shape[-1] % blocksize == 0:
                return original.call_boxed(keys, A, absmax, blocksize, quant_type, shape, dtype)
            packed, tail = A.reshape(-1).view(torch.uint8), count % blocksize
            whole = count - tail
            parts = [(packed[: whole // 2], absmax[: whole // blocksize], [whole // blocksize, blocksize])]
            if tail:
                parts.append((packed[whole // 2 :], absmax[-1:], [1, tail]))
            values = [
                original.call_boxed(keys, codes, scales, blocksize, quant_type, rows, dtype).reshape(-1)
                for codes, scales, rows in parts
                if len(codes)
            ]
            return torch.cat(values).reshape(shape)

        library = torch.library.Library("bitsandbytes", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced
            library.impl("dequantize_4bit", dequantize, "CPU", with_keyset=True, allow_override=True)
        _libraries.append(library)
        if not _is_right():
            raise RuntimeError(
                "bitsandbytes computes wrong 4-bit products on this CPU. Use a GPU, or another version of bitsandbytes."
            )


def _is_right() -> bool:
    """Whether `dequantize_4bit` uses each block's own scale, for rows of a half, one and a half, and three quarters."""
    code = get_4bit_type("nf4", device="cpu")
    for rows, length in ((8, 32), (4, 96), (3, 48)):
        values = torch.arange(1.0, rows * length + 1).view(rows, length)
        packed, state = quantize_4bit(values, blocksize=64, quant_type="nf4")
        codes = unpack_nibbles(packed, [rows, length])
        scales = state.absmax.repeat_interleave(64)[: values.numel()]
        if not torch.allclose(dequantize_4bit(packed, state).view(-1), code[codes.int()] * scales):
            return False
    return True
