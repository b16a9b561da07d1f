# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Options of record-level differential privacy: DP-SGD in every client's local run."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .options import OptionFacts, check_positive


@dataclass
class RecordOptions:
    """What any single row of a client may be exposed to. For silos with many rows each; a client's own policy overrides it.

    Args:
        record_epsilon: ε of all rounds together, for each client; None trains without. The noise follows from it.
        record_delta: δ beside it; below 1 over the number of rows.
        record_clip: Norm to which each row's gradient is scaled down.
    """

    FACTS: ClassVar[OptionFacts] = OptionFacts(
        card={"record_epsilon": "ε of each row, all rounds together", "record_delta": "δ of each row"},
        reference={"record_epsilon": None, "record_delta": None},
    )

    record_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Each local run is DP-SGD: no row of a client is exposed to more than this ε, all rounds together. "
            "docs/data-privacy.md says what it costs."
        },
    )
    record_delta: float | None = field(default=None, metadata={"help": "δ beside record_epsilon, such as 1e-5."})
    record_clip: float = field(
        default=1.0, metadata={"help": "Norm to which each row's gradient is scaled down, with record_epsilon."}
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: naming the options that are out of range or do not go together.
        """
        check_positive(self, "record_epsilon", "record_delta", optional=True)
        check_positive(self, "record_clip")
        if (self.record_epsilon is None) != (self.record_delta is None):
            raise ValueError(
                f"record_epsilon={self.record_epsilon} and record_delta={self.record_delta} come together: a guarantee is both."
            )
        if self.record_epsilon is not None:
            check_record_arguments(self)


def check_record_arguments(args: Any) -> None:
    """Refuse options with which a local run can't be DP-SGD, or its ε would not hold.

    Args:
        args: A [`FederatedConfig`].

    Raises:
        ValueError: naming the option and why.
    """
    if args.record_delta is not None and not args.record_delta < 1:
        raise ValueError(
            f"record_delta={args.record_delta}; expected a number below 1, and below 1 over the number of rows."
        )
    for name, reason in _REFUSED.items():
        if getattr(args, name, None):
            raise ValueError(
                f"{name}={getattr(args, name)!r} does not go with record-level differential privacy: {reason}. Leave it out."
            )


# Options that are refused where they are set.
_REFUSED = {
    "control_variate": "the owner's runs would get the clients' noise, too",
    "logit_adjustment": "it reads all of a client's labels before it trains, without noise",
    "fp16": "gradients are scaled, and steps are skipped where a row's overflow",
    "gradient_checkpointing": "layers run twice, and gradients of single rows are taken in between",
    "auto_find_batch_size": "a run that is begun again draws noise twice",
    "torch_compile": "gradients of single rows are taken by hooks",
    "packing": "a packed row is made of several records",
    "padding_free": "rows are joined to one",
}
