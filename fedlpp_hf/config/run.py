# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Options of the run: the owner's model, processes, and what is written at the end."""

from dataclasses import dataclass, field
from typing import ClassVar

from .options import OptionFacts, check_positive


@dataclass
class RunOptions:
    """Where a federation runs and what it leaves behind. None of these changes a result.

    Args:
        full_model: Path or Hub id of the owner's full-precision model. Only the owner's process opens it.
        client_workers: Processes that train a round's clients in parallel on this machine. 1 trains them in this one.
        merge: At the end, write the merged full model to `output_dir/_merged`.
        overwrite: Delete a federation that `output_dir` already holds.
        monitor_port: Port of 127.0.0.1 for `/healthz` and Prometheus' `/metrics`; None for neither.
        log_json: File for the log as lines of JSON, rotated at 10 MB; None for none.
    """

    FACTS: ClassVar[OptionFacts] = OptionFacts(
        free=(
            "full_model",
            "client_workers",
            "merge",
            "overwrite",
            "monitor_port",
            "log_json",
        ),
        beside={
            "full_model": None,
            "client_workers": 1,
            "merge": False,
            "overwrite": True,
            "monitor_port": None,
            "log_json": None,
        },
    )

    full_model: str | None = field(
        default=None,
        metadata={
            "help": "Path or Hub id of the owner's full-precision model. Only the owner's process opens it: it exports "
            "the base, evaluates the server's model in each round and merges at the end."
        },
    )
    client_workers: int = field(
        default=1,
        metadata={
            "help": "Number of processes that train a round's clients in parallel on this machine, each with its own "
            "base. 1: this process trains them one after the other."
        },
    )
    merge: bool = field(
        default=True, metadata={"help": "At the end, write the merged full model to output_dir/_merged."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete a federation that `output_dir` already holds."})
    monitor_port: int | None = field(
        default=None,
        metadata={
            "help": "Port of 127.0.0.1 on which the process that runs the rounds serves /healthz and /metrics (Prometheus)."
        },
    )
    log_json: str | None = field(
        default=None,
        metadata={
            "help": "File for the log as lines of JSON, beside the usual one: 10 MB, and five older files. Each process "
            "needs a file of its own."
        },
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: naming the option that is out of range.
        """
        check_positive(self, "client_workers")
        if self.monitor_port is not None and not 0 < self.monitor_port < 65536:
            raise ValueError(f"monitor_port={self.monitor_port}; expected a number from 1 to 65535.")
