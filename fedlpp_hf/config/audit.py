# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Options of the audit and of the references in the report."""

from dataclasses import dataclass, field
from typing import ClassVar

from .options import OptionFacts, check_positive


@dataclass
class AuditOptions:
    """What is measured beyond the rounds, all of it for simulations: it needs the clients' data in one process.

    Args:
        audit: At the end, attack with what clients hold, and report their share of the owner's gain.
        audit_data: Also attack updates, on the owner's own rows: what they tell about a client's rows.
        audit_threshold: Largest share that passes. Above it the run fails, after everything is written.
        audit_rows: Number of evaluation rows on which the audit compares models.
        audit_steps: Steps of an attacker on its rows, and of local-only training.
        audit_longer: The best attacker, and the best local-only training, go on to this many times `audit_steps`. 1: none does.
        compare_full_precision: Also run the federation without quantization, and the owner alone on its rows.
    """

    FACTS: ClassVar[OptionFacts] = OptionFacts(
        free=(
            "audit",
            "audit_data",
            "audit_threshold",
            "audit_rows",
            "audit_steps",
            "audit_longer",
            "compare_full_precision",
        ),
        beside={"audit": False, "audit_data": False, "audit_threshold": None, "compare_full_precision": False},
    )

    audit: bool = field(
        default=False,
        metadata={
            "help": "At the end, attack with what clients hold, and report how much of the owner's gain they get. "
            "Needs the clients' data in this process: for simulations only. docs/threat-model.md explains the result."
        },
    )
    audit_data: bool = field(
        default=False,
        metadata={
            "help": "With `audit`: also attack updates. A made-up client of one more round trains on half of the audit's evaluation "
            "rows; rows are rebuilt from its update, and members told from others. docs/data-privacy.md explains the result."
        },
    )
    audit_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Fail the run if a client, or half of them together, gets a larger share of the owner's gain."
        },
    )
    audit_rows: int = field(
        default=128, metadata={"help": "Number of evaluation rows on which the audit compares models."}
    )
    audit_steps: int = field(
        default=20,
        metadata={"help": "Training steps of an attacker on its own rows, and of local-only training."},
    )
    audit_longer: int = field(
        default=1,
        metadata={
            "help": "The best attacker, and the best local-only training, go on to this many times `audit_steps`: a client is bound "
            "to no number of steps. 1: none does."
        },
    )
    compare_full_precision: bool = field(
        default=False,
        metadata={
            "help": "Also run the federation without quantization, as a reference in the report, and, with an "
            "`owner_dataset`, the owner alone on its rows. Needs the full model and the clients' data in one process: "
            "for simulations only."
        },
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: naming the options that are out of range or do not go together.
        """
        check_positive(self, "audit_rows", "audit_steps", "audit_longer")
        if self.audit_data and not self.audit:
            raise ValueError("audit_data=True with audit=False; set audit=True, whose report it is a part of.")
        if self.audit_threshold is not None and not self.audit:
            raise ValueError(f"audit_threshold={self.audit_threshold} with audit=False; set audit=True.")
