# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""FedLPP for Hugging Face: federated LoRA in which clients hold only a quantized base, and the owner keeps the model."""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0.dev0"

# Names are imported on first use, so that `import fedlpp_hf` costs next to nothing.
_EXPORTS = {
    "AuditReport": "privacy",
    "FederatedConfig": "config",
    "FederatedMixin": "trainer",
    "FederatedServer": "server",
    "FederatedTrainer": "trainer",
    "QuantizedBaseCallback": "callbacks",
    "RoundStore": "store",
    "audit_federation": "privacy",
    "describe_base": "base",
    "dequantize": "quantization",
    "export_base": "base",
    "load_base": "base",
    "merge_adapter": "merge",
    "parse_args": "arguments",
    "quantize": "quantization",
}
__all__ = [
    "AuditReport",
    "FederatedConfig",
    "FederatedMixin",
    "FederatedServer",
    "FederatedTrainer",
    "QuantizedBaseCallback",
    "RoundStore",
    "audit_federation",
    "dequantize",
    "describe_base",
    "export_base",
    "load_base",
    "merge_adapter",
    "parse_args",
    "quantize",
]

if TYPE_CHECKING:
    from .arguments import parse_args
    from .base import describe_base, export_base, load_base
    from .callbacks import QuantizedBaseCallback
    from .config import FederatedConfig
    from .merge import merge_adapter
    from .privacy import AuditReport, audit_federation
    from .quantization import dequantize, quantize
    from .server import FederatedServer
    from .store import RoundStore
    from .trainer import FederatedMixin, FederatedTrainer


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
