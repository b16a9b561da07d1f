# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Federated LoRA for the Hugging Face Trainer, in which clients hold only a quantized base, and the owner keeps the model."""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0.dev0"

# Names are imported on first use, so that `import fedlpp_hf` costs next to nothing.
_EXPORTS = {
    "AuditReport": "audit.report",
    "FederatedCallback": "trainer.callbacks",
    "FederatedConfig": "config.federated",
    "FederatedMixin": "trainer.federated",
    "FederatedServer": "server.loop",
    "FederatedTrainer": "trainer.federated",
    "QuantizedBaseCallback": "client.guard",
    "RoundStore": "server.store",
    "audit_federation": "audit.audit",
    "describe_base": "base.manifest",
    "dequantize": "tensors.quantization",
    "export_base": "base.export",
    "load_base": "base.load",
    "merge_adapter": "merge.merge",
    "parse_args": "config.arguments",
    "quantize": "tensors.quantization",
}
__all__ = [
    "AuditReport",
    "FederatedCallback",
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
    from fedlpp_hf.tensors.quantization import dequantize, quantize

    from .audit.audit import audit_federation
    from .audit.report import AuditReport
    from .base.export import export_base
    from .base.load import load_base
    from .base.manifest import describe_base
    from .client.guard import QuantizedBaseCallback
    from .config.arguments import parse_args
    from .config.federated import FederatedConfig
    from .merge.merge import merge_adapter
    from .server.loop import FederatedServer
    from .server.store import RoundStore
    from .trainer.callbacks import FederatedCallback
    from .trainer.federated import FederatedMixin, FederatedTrainer


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
