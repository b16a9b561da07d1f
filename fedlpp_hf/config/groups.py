# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The groups of a federation's options, as one flat surface. It needs neither torch nor transformers."""

from .aggregation import AggregationOptions
from .audit import AuditOptions
from .client_dp import ClientDPOptions
from .precision import PrecisionOptions
from .record_dp import RecordOptions
from .rounds import RoundOptions
from .run import RunOptions
from .secure_sums import SecureSumOptions


GROUPS = (
    RoundOptions,
    PrecisionOptions,
    AggregationOptions,
    ClientDPOptions,
    RecordOptions,
    SecureSumOptions,
    AuditOptions,
    RunOptions,
)


class FederationOptions(
    RunOptions,
    AuditOptions,
    SecureSumOptions,
    RecordOptions,
    ClientDPOptions,
    AggregationOptions,
    PrecisionOptions,
    RoundOptions,
):
    """All options of a federation: what [`FederatedConfig`] adds to `TrainingArguments`."""
