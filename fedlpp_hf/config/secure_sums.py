# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Options of secure aggregation: the server learns the sum of a round's updates, and nothing else of them."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

from .extras import install_command
from .options import OptionFacts
from .rules import RULES


_FEWEST = 3  # clients; of two, each would learn the other's update


@dataclass
class SecureSumOptions:
    """Whether updates are masked, and how many clients must help to open their sum. docs/data-privacy.md says what it hides.

    Args:
        secure_aggregation: Clients mask their updates, so that the server learns the sum alone.
        secure_threshold: Share of a round's clients, from 1/2 to below 1. More than this share must help to open the sum, and the
            rest may drop out.
    """

    FACTS: ClassVar[OptionFacts] = OptionFacts(
        card={"secure_aggregation": "updates summed under masks"},
        reference={"secure_aggregation": False},
    )

    secure_aggregation: bool = field(
        default=False,
        metadata={
            "help": "Clients mask their updates (Bonawitz et al., 2017), so that the server learns the sum of a round's updates "
            "and nothing else of them. Needs weighting=uniform and clip_update_norm, or max_update_norm."
        },
    )
    secure_threshold: float = field(
        default=2 / 3,
        metadata={
            "help": "Under secure_aggregation, more than this share of a round's clients must help to open the sum; the rest may "
            "drop out. From 1/2, with which the server alone can't cheat, to below 1; above 2/3, fewer than a third of "
            "the clients may even help it."
        },
    )

    def check(self) -> None:
        """
        Raises:
            ValueError: naming the options that are out of range or do not go together, or the packages that are missing.
        """
        if not 0.5 <= self.secure_threshold < 1:
            raise ValueError(
                f"secure_threshold={self.secure_threshold}; expected a share from 0.5 to below 1: with less than half of the "
                "clients, the server could open the sums of two halves, and take them apart."
            )
        if self.secure_aggregation:
            _check_others(self)
            if missing := [name for name in ("cryptography", "Crypto") if find_spec(name) is None]:
                package = "pycryptodome" if missing == ["Crypto"] else "cryptography"
                raise ValueError(
                    f"secure_aggregation=True needs {package}, which is not installed: {install_command('privacy')}"
                )


def _check_others(options: Any) -> None:
    for name, wanted, why in (
        ("weighting", "uniform", "the server can't weigh what it can't see"),
        ("robust", "none", "robust rules look at single updates, and the server sees none"),
        ("update_density", 1.0, "the positions of the values that a client sends can't be masked"),
    ):
        if (value := getattr(options, name)) != wanted:
            raise ValueError(
                f"secure_aggregation=True does not go with {name}={value!r}: {why}. Set {name}={wanted!r}."
            )
    if RULES[options.aggregation].averages_products:
        raise ValueError(
            f"secure_aggregation=True does not go with aggregation={options.aggregation!r}, which needs the products of single "
            "updates. Use aggregation='fedavg' or 'freeze_a'."
        )
    if options.clip_update_norm is None and options.max_update_norm is None:
        raise ValueError(
            "secure_aggregation=True needs a bound on updates, so that their sum can't overflow. Set clip_update_norm, or "
            "max_update_norm, above which a client refuses to send its update."
        )
    if (options.clip_update_norm or 0.0) > (options.max_update_norm or float("inf")):
        raise ValueError(
            f"clip_update_norm={options.clip_update_norm} with max_update_norm={options.max_update_norm}: under "
            "secure_aggregation clients refuse to send what is longer. Lower clip_update_norm."
        )
    clients = options.clients_per_round or options.num_clients
    if clients is not None and clients < _FEWEST:
        raise ValueError(
            f"secure_aggregation=True with {clients} clients in a round: of two, each would learn the other's update, and one has "
            f"no sum to hide in. It needs {_FEWEST} or more."
        )
