# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The gate of a client with a policy: what comes in is checked before training, what goes out before sending."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..tensors.adapters import global_norm
from ..wire.compression import decompress_update
from ..wire.messages import ClientTask, ClientUpdate
from .ledger import ClientLedger
from .policy import ClientPolicy, PolicyRefusal
from .proxy_check import check_proxy, is_rank_one


Tensors = Mapping[str, torch.Tensor]

METRICS = {"loss", "steps", "clipped", "record_epsilon", "record_noise_multiplier"}  # that an update may have
_ROUNDING = 1 + 1e-5  # of float32 sums


class ClientGate:
    """Holds a client to its own [`ClientPolicy`], with its [`ClientLedger`].

    Args:
        policy: The client's.
        directory: Of the ledger.
        dry_run: Whether nothing will be sent; then nothing counts.
        in_sum: Whether the client answers with a part of a secure sum.
    """

    def __init__(self, policy: ClientPolicy, directory: Path, dry_run: bool = False, in_sum: bool = False):
        self.policy, self.directory, self.dry_run, self.in_sum = policy, directory, dry_run, in_sum
        self.ledger = ClientLedger.open(directory)

    def admit(self, task: ClientTask, initial: Tensors) -> None:
        """Check a task before anything is trained, and enter it into the ledger.

        Args:
            task: From the server.
            initial: The client's own untouched adapter.

        Raises:
            PolicyRefusal: if the policy does not allow it.
        """
        policy, ledger = self.policy, self.ledger
        policy.check_task(task, self.in_sum)
        if ledger.has_other(task):
            raise PolicyRefusal(
                f"Round {task.round} was answered already, and this task for it is another one: two answers to two adapters "
                "tell more than one. If the owner went back to an earlier round and said so, move the client's ledger away."
            )
        known = ledger.has(task)
        counts = not known or task.options.share_noise > 0  # its noise is drawn anew: the mean of two has less
        if policy.max_rounds is not None and counts and len(ledger.rounds) >= policy.max_rounds:
            raise PolicyRefusal(
                f"This client has answered {len(ledger.rounds)} rounds, and its policy allows {policy.max_rounds}."
            )
        if policy.check_proxy and task.proxy is not None and not known:
            try:
                check_proxy(task, initial, ledger.earlier(task), policy.max_proxy_change)
            except ValueError as error:
                raise PolicyRefusal(
                    f"The task's adapter looks made to leak: {error}. If the owner can explain it, raise max_proxy_change, or "
                    "set check_proxy: false."
                ) from error
        if counts and not self.dry_run:
            ledger.begin(task)

    def note_change(self, delta: Tensors) -> None:
        """Keep how large the client's own change was, to compare the next round's adapter with."""
        if not self.dry_run:
            self.ledger.steps = {key: float(tensor.norm()) for key, tensor in delta.items()}
            outputs = [key for key in delta if key.endswith(".lora_B.weight")]
            self.ledger.rank_one = [key for key in outputs if is_rank_one(delta[key])]
            self.ledger.write()

    def check_update(self, update: ClientUpdate, reference: Tensors) -> None:
        """Check an update before it is sent: nothing but the adapter's change and known metrics, and no longer than the clip.

        Raises:
            PolicyRefusal: naming what must not leave.
        """
        if more := update.metrics.keys() - METRICS:
            raise PolicyRefusal(f"The update has the metrics {sorted(more)}; only {sorted(METRICS)} may leave.")
        try:
            norm = global_norm(decompress_update(update.delta, reference))
        except ValueError as error:
            raise PolicyRefusal(f"The update is not the adapter's change: {error}") from error
        if self.policy.clip_norm is not None and norm > self.policy.clip_norm * _ROUNDING:
            raise PolicyRefusal(f"The update's norm is {norm:.4g}; the policy's clip is {self.policy.clip_norm:.4g}.")
