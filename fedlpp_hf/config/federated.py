# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""`FederatedConfig`: the groups of options on top of `TrainingArguments`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from .groups import GROUPS, FederationOptions
from .metrics import lower_is_better
from .sharding import check_sharding


logger = logging.get_logger(__name__)


@dataclass
class FederatedConfig(FederationOptions, TrainingArguments):
    """Arguments of a federation, on top of [`~transformers.TrainingArguments`], which describe one client's local run.

    The options of each group are documented there: [`RoundOptions`], [`PrecisionOptions`], [`AggregationOptions`],
    [`ClientDPOptions`], [`RecordOptions`], [`SecureSumOptions`], [`AuditOptions`], [`RunOptions`]. `num_train_epochs` (1 by default)
    or `max_steps`, the optimizer, the schedule and the batch size hold for each client and round. Local runs neither checkpoint nor
    evaluate: the federation commits and evaluates every round. `load_best_model_at_end` publishes the best round by
    `metric_for_best_model` of the server's metrics.

    Raises:
        ValueError: for options that are out of range or do not go together.
    """

    num_train_epochs: float = field(default=1.0, metadata={"help": "Local epochs of each client in each round."})

    def __post_init__(self):
        options: Any = self
        check_sharding(options)  # first: the parent would set it up
        best = options.load_best_model_at_end
        options.load_best_model_at_end = False  # for the parent, which would ask for a run's own checkpoints
        if best and options.metric_for_best_model is None:
            options.metric_for_best_model = "loss"
        if options.greater_is_better is None and options.metric_for_best_model is not None:
            options.greater_is_better = not lower_is_better(options.metric_for_best_model)
        super().__post_init__()
        if self.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy={self.eval_strategy!r}: local runs do not evaluate. Leave it at 'no'; the federation "
                "evaluates in every round, on `eval_dataset`."
            )
        self.save_strategy = "no"
        self.load_best_model_at_end = best
        self.eval_on_start = False  # the federation always does, and a local run never
        # Several GPUs in one process mean nn.DataParallel to a Trainer: the base copied in every step, batches n times as
        # large. Ranks (`torchrun`) and `client_workers` have one GPU each.
        self._n_gpu = min(self.n_gpu, 1)
        for group in GROUPS:
            group.check(self)
        if self.bf16 and self.device.type == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16"):
            logger.warning("bf16=True on a CPU without AVX512-bf16 is many times slower than float32; leave it out.")
