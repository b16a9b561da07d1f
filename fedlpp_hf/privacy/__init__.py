# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Model privacy, measured: attackers that have what clients have, and the share of the owner's gain that they get."""

from .audit import audit_federation, check_auditable
from .audit_report import AuditReport, CoalitionAudit
from .stolen_value import StolenValue, estimate_stolen_value


__all__ = [
    "AuditReport",
    "CoalitionAudit",
    "StolenValue",
    "audit_federation",
    "check_auditable",
    "estimate_stolen_value",
]
