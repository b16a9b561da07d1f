# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Options of aggregation: from a round's updates to the server's next adapter."""

from dataclasses import dataclass, field
from typing import ClassVar

from .options import OptionFacts, check_choice, check_positive
from .rules import ROBUST_RULES, RULES, SERVER_OPTIMIZERS, check_rules


@dataclass
class AggregationOptions:
    """How updates are bounded, averaged and applied. docs/aggregation.md says what each does and does not.

    Args:
        aggregation: `fedavg` averages the factors, `freeze_a` trains B alone, `exact` averages the products B·A.
        weighting: Weight of an update in the mean: `examples` or `uniform`.
        robust: `none`, `median`, `trimmed_mean` or `multi_krum`.
        num_attackers: How many attackers per round the robust rule must withstand.
        max_update_norm: Norm above which the server rejects an update.
        clip_update_norm: Clients scale an update with a larger norm down to this one.
        fedprox_mu: Weight of FedProx's pull towards the proxy (arXiv 1812.06127).
        logit_adjustment: τ of the log-priors of a client's own labels, added to its classifier's logits while it trains
            (arXiv 2007.07314). 1 where clients' labels differ, 0 for none.
        server_optimizer: `sgd` or `yogi` (FedOpt, arXiv 2003.00295).
        server_learning_rate: Step of the server along the mean update. 1 with momentum 0 is the paper's rule; Yogi's
            is a step per coordinate, 0.01 rather than 1.
        server_momentum: Momentum of `sgd` (FedAvgM, arXiv 1909.06335).
        control_variate: How much of the quantizer's effect to subtract from the mean update: 1 all, 0 none. The owner
            estimates it on its own rows (`owner_dataset`).
        control_variate_runs: How many pairs of the owner's runs the estimate averages.
        base_weights: λ, from 0 to below 1: the server's model is W − λE + θ, E = W − Q(W). Of several, each round
            takes the one with the least loss on the owner's `selection_dataset`.
        update_scales: s, above 0: the server's step is s times the mean update. Of several, each round takes the one with
            the least loss on the owner's `selection_dataset`; the first is the one that λ is chosen with.
    """

    FACTS: ClassVar[OptionFacts] = OptionFacts(
        card={
            "aggregation": "aggregation",
            "robust": "robust rule",
            "clip_update_norm": "updates clipped to the norm",
            "server_optimizer": "server optimizer",
            "control_variate": "control variate",
        },
        beside={"control_variate": 0.0, "base_weights": [0.0], "update_scales": [1.0]},
        reference={"robust": "none", "num_attackers": 0},
    )

    aggregation: str = field(
        default="fedavg",
        metadata={
            "help": "fedavg (mean of the factors), freeze_a (B alone is trained), exact (mean of the products B·A). "
            "docs/aggregation.md compares them."
        },
    )
    weighting: str = field(
        default="examples",
        metadata={
            "help": "Weight of an update in the mean: examples, or uniform, which is the default over a network."
        },
    )
    robust: str = field(default="none", metadata={"help": "none, median, trimmed_mean or multi_krum."})
    num_attackers: int = field(
        default=0, metadata={"help": "How many attackers per round a robust rule must withstand."}
    )
    max_update_norm: float | None = field(
        default=None, metadata={"help": "Norm above which the server rejects an update."}
    )
    clip_update_norm: float | None = field(
        default=None, metadata={"help": "Clients scale an update with a larger norm down to this one."}
    )
    fedprox_mu: float = field(default=0.0, metadata={"help": "Weight of FedProx's pull towards the proxy."})
    logit_adjustment: float = field(
        default=0.0,
        metadata={
            "help": "Train each client's classifier as if its labels were balanced: adds this many times the log-priors of "
            "its own labels to the logits. 1 where clients' labels differ, 0 for none."
        },
    )
    server_optimizer: str = field(default="sgd", metadata={"help": "sgd, or yogi (FedOpt)."})
    server_learning_rate: float = field(
        default=1.0,
        metadata={"help": "Step of the server along the mean update. 1 with momentum 0 is the paper's rule."},
    )
    server_momentum: float = field(default=0.0, metadata={"help": "Momentum of the server's sgd (FedAvgM)."})
    control_variate: float = field(
        default=0.0,
        metadata={
            "help": "How much of the quantizer's effect to subtract from the mean update: 1 all, 0 none. In each "
            "round the owner measures it on its own rows (`owner_dataset`), training once on the base and once on the "
            "full model."
        },
    )
    control_variate_runs: int = field(
        default=1,
        metadata={
            "help": "How many pairs of the owner's runs to average, each with other batches and dropout. More runs "
            "reduce the noise and cost only the owner; 4 is a good number."
        },
    )
    base_weights: list[float] = field(
        default_factory=lambda: [0.0],
        metadata={
            "help": "Values of λ, from 0 to below 1, for the server's model W − λE + θ, E = W − Q(W). Of several, the "
            "owner chooses in each round the one with the least loss on its `selection_dataset`."
        },
    )
    update_scales: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "Values of s, above 0: the server moves by s times the mean update. A mean of clients that trained apart "
            "is too short: of 1 1.25 1.5, the owner chooses in each round the one with the least loss on its "
            "`selection_dataset`."
        },
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: naming the options that are out of range or do not go together.
        """
        check_choice(self, "aggregation", tuple(RULES))
        check_choice(self, "robust", tuple(ROBUST_RULES))
        check_choice(self, "weighting", ("examples", "uniform"))
        check_choice(self, "server_optimizer", SERVER_OPTIMIZERS)
        check_positive(self, "server_learning_rate", "control_variate_runs")
        check_positive(self, "max_update_norm", "clip_update_norm", optional=True)
        if not self.fedprox_mu >= 0:
            raise ValueError(f"fedprox_mu={self.fedprox_mu}; expected 0 or more.")
        if not 0 <= self.logit_adjustment <= 10:
            raise ValueError(f"logit_adjustment={self.logit_adjustment}; expected a number from 0 to 10.")
        if not 0 <= self.server_momentum < 1:
            raise ValueError(f"server_momentum={self.server_momentum}; expected a number in [0, 1).")
        if not self.base_weights or not all(0 <= weight < 1 for weight in self.base_weights):
            raise ValueError(f"base_weights={self.base_weights}; expected one or more numbers from 0 to below 1.")
        if not self.update_scales or not all(0 < scale <= 10 for scale in self.update_scales):
            raise ValueError(f"update_scales={self.update_scales}; expected one or more numbers above 0, at most 10.")
        if self.update_scales != [1.0] and self.server_optimizer != "sgd":
            raise ValueError(
                f"update_scales={self.update_scales} does not go with server_optimizer={self.server_optimizer!r}, whose steps "
                "hardly depend on the update's size. Set server_learning_rate."
            )
        check_rules(self)
