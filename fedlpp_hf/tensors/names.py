# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Names of a PEFT repository's files, for modules that must not wait for torch."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
