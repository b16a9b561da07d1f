# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What left the owner for its clients, tensor by tensor: values, bits of information, bytes."""

import math
from typing import Any

from ..base.manifest import read_manifest
from ..report.sent import SentTensor
from ..tensors.lora import PREFIX
from ..tensors.quantization import QuantizedTensor


def list_sent(trainer: Any) -> list[SentTensor]:
    """The tensors of the base and of a proxy of the federation that `trainer` has run."""
    base_dir = trainer.blueprint.base_dir
    if base_dir:
        entries = read_manifest(base_dir)["tensors"]
        sent = [
            SentTensor("base", e["name"], e["kind"], math.prod(e["shape"]), int(e["information_bytes"]))
            for e in entries
        ]
    else:
        sent = [
            SentTensor("base", name.removeprefix(PREFIX), "full_precision", p.numel(), p.nbytes)
            for name, p in trainer.guard.frozen
        ]
    if not trainer.args.broadcasts:
        return sent
    for name, tensor in trainer.server.make_proxy(trainer.server.adapter).items():
        kind = "quantized" if isinstance(tensor, QuantizedTensor) else "full_precision"
        sent.append(SentTensor("proxy", name, kind, math.prod(tensor.shape), tensor.nbytes))
    return sent
