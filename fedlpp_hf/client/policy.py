# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a client itself demands of a federation, read from a file of its own: it stands whatever the server's tasks say."""

import math
import os
from dataclasses import dataclass, fields
from typing import Any

from ..config.rules import RULES
from ..config.spelling import suggest
from ..config.yaml_files import read_yaml
from ..privacy.record_accounting import RecordBudget
from ..wire.messages import ClientTask


class PolicyRefusal(RuntimeError):
    """A task, or an update, that this client's policy does not allow."""


@dataclass(frozen=True, slots=True)
class ClientPolicy:
    """A client's own conditions. What is left out is not demanded.

    Args:
        clip_norm: Norm to which a longer update is scaled down, unless the task's clip is smaller.
        max_rounds: Rounds that this client answers in all, whatever federation the server says they are of.
        min_clients: Clients that a task must say are asked in its round. The client can't verify it. Under secure aggregation it also
            counts the members of the sum.
        min_noise_multiplier: Noise, as a multiple of the clip, that a task must say is added to the round's sum. The client
            can't verify it, unless the clients of a secure sum add it.
        min_local_steps, max_local_steps: Optimizer steps of a local run, which the configuration sets.
        rules: Aggregation rules that a task may name.
        max_update_bits: Bits per value that a task may ask for.
        check_proxy: Refuse an adapter that looks made to leak (see [`check_proxy`]).
        record_epsilon: ε that any row may be exposed to, in `max_rounds` rounds together: each local run is then DP-SGD.
        record_delta: δ beside it.
        record_clip: Norm to which each row's gradient is scaled down.
        max_proxy_change: How far the adapter may move from round to round, in multiples of this client's own last update.

    Raises:
        ValueError: for a value of another type, out of range, or without another that it needs.
    """

    clip_norm: float | None = None
    max_rounds: int | None = None
    min_clients: int | None = None
    min_noise_multiplier: float | None = None
    min_local_steps: int | None = None
    max_local_steps: int | None = None
    rules: tuple[str, ...] | None = None
    max_update_bits: int | None = None
    check_proxy: bool = True
    max_proxy_change: float = 10.0
    record_epsilon: float | None = None
    record_delta: float | None = None
    record_clip: float = 1.0

    def __post_init__(self) -> None:
        for name, value in ((entry.name, getattr(self, entry.name)) for entry in fields(self)):
            if name == "check_proxy":
                _require(isinstance(value, bool), name, value, "true or false")
            elif name == "rules":
                known = isinstance(value, tuple) and len(value) > 0 and all(rule in list(RULES) for rule in value)
                _require(value is None or known, name, value, f"a list of {', '.join(RULES)}")
            elif name in _COUNTS:
                _require(value is None or (type(value) is int and value > 0), name, value, "a whole number above 0")
            else:
                number = type(value) in (int, float) and math.isfinite(value) and value > 0
                _require(number or (value is None and name not in _NEEDED), name, value, "a number above 0")
        if self.min_local_steps and self.max_local_steps and self.min_local_steps > self.max_local_steps:
            raise ValueError(
                f"The policy has min_local_steps={self.min_local_steps} and max_local_steps={self.max_local_steps}; expected a "
                "range that some run can be in."
            )

        given = (self.record_epsilon is not None, self.record_delta is not None)
        if any(given) and not (all(given) and self.max_rounds):
            raise ValueError(
                f"The policy has record_epsilon={self.record_epsilon}, record_delta={self.record_delta} and max_rounds="
                f"{self.max_rounds}; expected all three: the noise follows from them."
            )

    @property
    def record_budget(self) -> RecordBudget | None:
        """What any row may be exposed to, if the policy says it."""
        if self.record_epsilon is None or self.record_delta is None or self.max_rounds is None:
            return None
        return RecordBudget(self.record_epsilon, self.record_delta, self.record_clip, self.max_rounds)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "ClientPolicy":
        """A policy from a YAML file.

        Raises:
            ValueError: for an unknown key, with the nearest known one, or as the class.
        """
        values = read_yaml(os.fspath(path))
        known = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"The policy `{path}` has an unknown key `{key}`{suggest(str(key), known)}")
        return cls(**{key: _convert(key, value) for key, value in values.items()})

    def check_task(self, task: ClientTask, in_sum: bool = False) -> None:
        """Refuse a task before anything of it is trained.

        Args:
            task: From the server.
            in_sum: Whether the client answers with a part of a secure sum, to which no server can add noise.

        Raises:
            PolicyRefusal: naming what the task says and what the policy allows.
        """
        options = task.options
        for name in ("proximal_mu", "logit_adjustment", "clip_norm", "share_noise"):
            value = getattr(options, name)
            if not 0 <= value < math.inf:
                raise PolicyRefusal(f"The task has {name}={value}; expected a finite number, 0 or more.")
        if self.rules is not None and options.rule not in self.rules:
            raise PolicyRefusal(f"The task has the rule {options.rule!r}; the policy allows {', '.join(self.rules)}.")
        if self.max_update_bits is not None and options.update_bits > self.max_update_bits:
            raise PolicyRefusal(
                f"The task asks for {options.update_bits} bits per value; the policy allows {self.max_update_bits}."
            )
        if options.share_noise and not in_sum:
            raise PolicyRefusal(
                "The task leaves the noise to the clients of a secure sum, and this client's options have no secure_aggregation."
            )
        noise = ("share_noise", options.share_noise) if in_sum else ("noise_multiplier", task.noise_multiplier)
        for (name, said), least in (
            (("num_clients", task.num_clients), self.min_clients),
            (noise, self.min_noise_multiplier),
        ):
            if least is not None and not least <= said < math.inf:
                raise PolicyRefusal(f"The task announces {name}={said:g}; the policy demands at least {least:g}.")
        if in_sum and self.min_noise_multiplier is not None and options.share_colluders < 1:
            raise PolicyRefusal(
                "The task counts on the noise of every client of the sum (share_colluders=0), so one that tells the server its share "
                "takes the noise below the policy's min_noise_multiplier. The server needs colluding_clients of 1 or more."
            )

    def check_steps(self, steps: int) -> None:
        """Refuse a local run of more or fewer steps than the policy allows.

        Raises:
            PolicyRefusal: naming both.
        """
        least, most = self.min_local_steps or 0, self.max_local_steps or math.inf
        if not least <= steps <= most:
            raise PolicyRefusal(f"The local run would have {steps} steps; the policy allows {least} to {most}.")


_NEEDED = {"max_proxy_change", "record_clip"}
_COUNTS = {"max_rounds", "min_clients", "min_local_steps", "max_local_steps", "max_update_bits"}


def _require(allowed: bool, name: str, value: Any, expected: str) -> None:
    if not allowed:
        raise ValueError(f"The policy has {name}={value!r}; expected {expected}.")


def _convert(key: str, value: Any) -> Any:
    """YAML's value as the field has it: 1e-5 is text in YAML 1.1, and a list of rules is a tuple here."""
    if key == "rules" and isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and key not in ("rules", "check_proxy") and key not in _COUNTS:
        try:
            return float(value)
        except ValueError:
            return value
    return value
