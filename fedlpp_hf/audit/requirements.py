# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What an audit needs, checked before the rounds; every trainer imports this, and the audit itself only to run one."""

from typing import Any

from ..processes.measurement import choose_rows


def check_auditable(trainer: Any) -> None:
    """Refuse, before the rounds, a federation that could not be audited after them.

    Raises:
        ValueError: if there is no owner, no evaluation dataset, no client's data, more than one process, or rounds that are
            attacked would be deleted.
    """
    if trainer.owner is None:
        raise ValueError(
            "audit=True compares with the owner's model; set `full_model`, or pass the full model's path."
        )
    if not trainer.client_datasets:
        raise ValueError(
            "audit=True needs the clients' rows in this process, but they are elsewhere: clients run on other "
            "machines. Set audit=False, and audit a simulation: pass rows as `train_dataset`, and call train()."
        )
    if trainer.args.world_size > 1:
        raise ValueError(
            f"audit=True with {trainer.args.world_size} processes; expected one. Launch one process, or set "
            "audit=False."
        )
    limit = trainer.args.save_total_limit
    if trainer.args.broadcasts and limit is not None and 0 < limit < trainer.args.num_rounds:
        raise ValueError(
            f"audit=True with save_total_limit={limit}: the audit rebuilds the proxy of each of {trainer.args.num_rounds} rounds, "
            "and older rounds would be deleted. Leave save_total_limit out, or set audit=False."
        )
    choose_rows(trainer.eval_dataset, 1, 0)
