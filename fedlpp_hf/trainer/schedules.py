# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Learning-rate schedules that begin in their middle: a round's part of one that runs over the federation."""

from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def start_schedule_at_(scheduler: LRScheduler, step: int) -> None:
    """Put a new schedule where it would be after `step` steps.

    Raises:
        ValueError: if its learning rate is no function of the step alone.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"learning_rate_horizon='federation' needs a schedule in closed form, not {type(scheduler).__name__}."
        )
    scheduler.last_epoch = step
    for group, rate, factor in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(step)
