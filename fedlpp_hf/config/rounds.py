# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Options of the rounds: who takes part, how often, and what is broadcast."""

from dataclasses import dataclass, field
from typing import ClassVar

from .options import OptionFacts, check_choice, check_positive


@dataclass
class RoundOptions:
    """Which clients exist, which of them a round asks, and when it closes.

    Args:
        num_rounds: Rounds of the federation.
        num_clients: Clients that an `iid` or `dirichlet` partition makes; 8 by default. Natural clients bring their number.
        clients_per_round: Clients drawn in each round, uniformly without replacement. All by default.
        min_clients: Accepted updates that a round needs. With fewer, it fails and the federation stops.
        over_sample: Share of clients asked beyond `clients_per_round`. The round closes when enough have answered.
        round_timeout: Seconds until a round closes with the updates received so far.
        partition: `iid`, `dirichlet`, or the name of a column whose values are natural clients.
        dirichlet_alpha: Concentration of the Dirichlet partition (arXiv 1909.06335). Small values make clients differ.
        dirichlet_column: Column that the Dirichlet partition distributes unevenly.
        broadcast: `every_round` sends the proxy in each round, as the paper does. `never` sends nothing: each client
            starts from the untouched base, continues from its own adapter in later rounds, and sends its total change
            since the base.
        learning_rate_horizon: What the learning rate schedule covers: each local run (`round`), or all rounds
            (`federation`).
    """

    FACTS: ClassVar[OptionFacts] = OptionFacts(
        card={
            "num_rounds": "rounds",
            "clients_per_round": "clients per round",
            "partition": "partition",
            "broadcast": "broadcast",
        },
        free=("round_timeout", "min_clients"),
        beside={"round_timeout": None},
    )

    num_rounds: int = field(default=10, metadata={"help": "Rounds of the federation."})
    num_clients: int | None = field(
        default=None, metadata={"help": "Clients that an iid or dirichlet partition makes (8 by default)."}
    )
    clients_per_round: int | None = field(
        default=None, metadata={"help": "Clients drawn in each round, uniformly without replacement. All by default."}
    )
    min_clients: int = field(
        default=1, metadata={"help": "Accepted updates that a round needs. With fewer, the federation stops."}
    )
    over_sample: float = field(
        default=0.0,
        metadata={
            "help": "Share of extra clients to ask beyond clients_per_round. The round closes when enough have "
            "answered."
        },
    )
    round_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds until a round closes with the updates received so far. Over Flower, 3600 by default."
        },
    )
    partition: str = field(
        default="iid",
        metadata={
            "help": "How a dataset becomes clients: iid, dirichlet, or the name of a column of natural clients."
        },
    )
    dirichlet_alpha: float = field(
        default=0.5, metadata={"help": "Concentration of the Dirichlet partition: small values make clients differ."}
    )
    dirichlet_column: str = field(
        default="label", metadata={"help": "Column that the Dirichlet partition distributes unevenly."}
    )
    broadcast: str = field(
        default="every_round",
        metadata={
            "help": "every_round: send clients the proxy in each round. never: send none; each client continues from "
            "its own adapter, so what the others taught can't be stolen."
        },
    )
    learning_rate_horizon: str = field(
        default="round",
        metadata={
            "help": "What the learning rate schedule covers: each local run (`round`), or all rounds (`federation`)."
        },
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: naming the options that are out of range or do not go together.
        """
        check_positive(self, "num_rounds", "min_clients", "dirichlet_alpha")
        check_positive(self, "num_clients", "clients_per_round", "round_timeout", optional=True)
        check_choice(self, "broadcast", ("every_round", "never"))
        check_choice(self, "learning_rate_horizon", ("round", "federation"))
        if not self.over_sample >= 0:
            raise ValueError(f"over_sample={self.over_sample}; expected a share, 0 or more.")
        if self.over_sample and self.clients_per_round is None:
            raise ValueError(
                f"over_sample={self.over_sample} with clients_per_round=None, which asks all clients already. Set "
                "clients_per_round, or leave over_sample out."
            )
        if self.num_clients is None and self.partition in ("iid", "dirichlet"):
            self.num_clients = 8
        if self.num_clients is not None:
            self.check_clients(self.num_clients)

    def check_clients(self, num_clients: int) -> None:
        """Refuse rounds that want more clients than there are.

        Raises:
            ValueError: naming both numbers.
        """
        for option in ("clients_per_round", "min_clients"):
            wanted = getattr(self, option)
            if wanted is not None and wanted > num_clients:
                raise ValueError(f"{option}={wanted}, but there are only {num_clients} clients. Lower {option}.")

    def fit_to(self, num_clients: int) -> None:
        """Lower what rounds ask for to the clients that there are: a trainer in another process may hold fewer."""
        self.min_clients = min(self.min_clients, max(num_clients, 1))
        if self.clients_per_round is not None:
            self.clients_per_round = min(self.clients_per_round, max(num_clients, 1))

    @property
    def broadcasts(self) -> bool:
        """Whether clients are sent a proxy."""
        return self.broadcast == "every_round"
