# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Options of client-level differential privacy."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

from .extras import install_command
from .options import OptionFacts, check_choice, check_positive
from .rules import RULES


# With less noise ε is in the hundreds.
LEAST_NOISE = 0.1
LARGEST_SHARED_NOISE = 1024.0  # that clients of a secure sum add
_OFF = {
    "target_epsilon": None,
    "target_delta": None,
    "noise_multiplier": None,
    "client_sampling": "fixed",
    "clip_quantile": None,
    "colluding_clients": 1,
}


@dataclass
class ClientDPOptions:
    """Client-level differential privacy: the model hardly depends on any single client. It is on where `target_epsilon` or
    `noise_multiplier` is set. The noise follows from `clip_update_norm`. The server adds it, or, under `secure_aggregation`, the clients
    do, in shares. docs/data-privacy.md says against whom it holds.

    Args:
        target_epsilon: ε that all rounds together may spend. A round that would exceed it does not start.
        target_delta: δ of the ε that is reported; below 1 / number of clients.
        noise_multiplier: Standard deviation of the noise on a round's sum of updates, divided by the clip. By default the
            least one with which `num_rounds` rounds spend `target_epsilon`.
        client_sampling: `fixed` draws `clients_per_round` clients. `poisson` draws each client by itself, so many on average;
            ε is then smaller. It is for rounds with noise alone.
        clip_quantile: Share of the updates that are to be shorter than the clip, which then follows them from round to round
            (arXiv 1905.03871), from `clip_update_norm` on. By default the clip stays.
        colluding_clients: Under `secure_aggregation`, clients that may tell the server their share of the noise, or add none: it does
            not count.
    """

    FACTS: ClassVar[OptionFacts] = OptionFacts(
        card={
            "target_epsilon": "client-level differential privacy: ε at most",
            "target_delta": "client-level differential privacy: δ",
        },
        beside=_OFF,
        reference=_OFF,
    )

    target_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Client-level differential privacy: ε that all rounds together may spend. A round that would exceed it "
            "does not start."
        },
    )
    target_delta: float | None = field(
        default=None, metadata={"help": "δ of client-level differential privacy; below 1 / number of clients."}
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation of the noise on a round's sum of updates, divided by clip_update_norm. By default "
            "what num_rounds rounds need for target_epsilon."
        },
    )
    client_sampling: str = field(
        default="fixed",
        metadata={
            "help": "fixed: draw clients_per_round clients. poisson: draw each client by itself, so many on average; only "
            "with differential privacy, whose ε it makes smaller."
        },
    )
    clip_quantile: float | None = field(
        default=None,
        metadata={
            "help": "Let the clip follow the updates, such that this share of them is shorter; it starts at "
            "clip_update_norm. Only with differential privacy."
        },
    )
    colluding_clients: int = field(
        default=1,
        metadata={
            "help": "With differential privacy under secure_aggregation: clients of a round that may tell the server their share of "
            "the noise, or add none. The noise of the others is enough by itself."
        },
    )

    @property
    def adds_noise(self) -> bool:
        """Whether client-level differential privacy is on."""
        return self.target_epsilon is not None or self.noise_multiplier is not None

    def check(self) -> None:
        """
        Raises:
            ValueError: naming the options that are out of range, missing, or break the analysis.
        """
        check_choice(self, "client_sampling", ("fixed", "poisson"))
        check_positive(self, "target_epsilon", "noise_multiplier", optional=True)
        for name in ("target_delta", "clip_quantile"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}={value}; expected a number between 0 and 1.")
        if self.colluding_clients < 0:
            raise ValueError(f"colluding_clients={self.colluding_clients}; expected a number from 0.")
        if self.adds_noise:
            _check_private(self)
            return
        for name, off in _OFF.items():
            if getattr(self, name) != off:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to client-level differential privacy, which is off. Set "
                    f"target_epsilon or noise_multiplier, or leave {name} out."
                )


# Beside what is refused with all noise: option, its only value, and why.
_AT_SERVER = (
    ("min_clients", 1, "that a round stopped would tell how many clients took part"),
    ("colluding_clients", 1, "without secure_aggregation the server adds the noise, and clients know none of it"),
)
_IN_SHARES = (
    (
        "client_sampling",
        "fixed",
        "the server knows who takes part, so there is nothing to gain; a sum needs its clients",
    ),
    ("clip_quantile", None, "how many updates are shorter than the clip would need noise of its own"),
    ("max_update_norm", None, "it bounds the mean, too, which has noise. Clients clip to clip_update_norm"),
    ("audit_data", False, "its canary clients go through noise that the server adds"),
)


def _check_private(options: Any) -> None:
    """Refuse what differential privacy lacks, and what its analysis does not cover.

    Raises:
        ValueError: naming the option, and saying why and what to do.
    """
    private = "Client-level differential privacy"
    if options.secure_aggregation:
        private += " under secure_aggregation"
    if find_spec("dp_accounting") is None:
        raise ValueError(f"{private} needs dp-accounting. Install it: {install_command('privacy')}")
    if options.target_delta is None:
        raise ValueError(f"{private} needs target_delta. Set it well below 1 / number of clients, for example 1e-5.")
    if options.clip_update_norm is None:
        raise ValueError(
            f"{private} needs clip_update_norm: without a bound on a client's whole update, modules_to_save included, no noise "
            "is enough. Set it near the median norm of your updates."
        )
    if options.noise_multiplier is not None and options.noise_multiplier < LEAST_NOISE:
        raise ValueError(
            f"noise_multiplier={options.noise_multiplier}; expected {LEAST_NOISE} or more. With less, ε is in the hundreds and "
            "protects nothing."
        )
    secure = options.secure_aggregation
    if secure and (options.noise_multiplier or 0.0) > LARGEST_SHARED_NOISE:
        raise ValueError(
            f"noise_multiplier={options.noise_multiplier}; expected up to {LARGEST_SHARED_NOISE:g} under secure_aggregation: with "
            "more, nothing is left of updates in the fixed point."
        )
    for name, allowed, reason in (
        ("weighting", "uniform", "a client with many examples would count for more than the noise covers"),
        ("robust", "none", "it looks at single updates, and one update can change what it makes of all others"),
        ("over_sample", 0.0, "who is in the sum would depend on how fast others are"),
        *(_IN_SHARES if secure else _AT_SERVER),
    ):
        if getattr(options, name) != allowed:
            raise ValueError(
                f"{private} does not go with {name}={getattr(options, name)!r}: {reason}. Set {name}={allowed!r}."
            )
    if RULES[options.aggregation].averages_products:
        raise ValueError(
            f"{private} does not go with aggregation={options.aggregation!r}: the clip bounds the factors, not the mean of "
            "their products. Set aggregation='freeze_a', where noise on B is noise on the product, or 'fedavg'."
        )
    if not options.broadcasts and options.num_rounds > 1:
        raise ValueError(
            f"{private} does not go with broadcast='never' in num_rounds={options.num_rounds}: clients would send their whole "
            "way again in each round, each round would be paid for, and only one is published. Set num_rounds=1."
        )
