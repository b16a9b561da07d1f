# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The options of the federation whose report is written."""

import pytest

from fedlpp_hf.config.federated import FederatedConfig


@pytest.fixture
def args(tmp_path) -> FederatedConfig:
    return FederatedConfig(str(tmp_path), num_rounds=2, base_bits=2, adapter_bits=32, use_cpu=True, report_to=[])
