# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The server: the only round loop. It touches adapters only; no parameter of it could take a model."""

import functools
import json
import math
import secrets
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftConfig

from ..aggregation.optimizers import ServerOptimizer
from ..aggregation.products import join_residual, lower_rank, pad_update, truncate_adapter
from ..aggregation.rules import aggregate, sum_updates
from ..config.federated import FederatedConfig
from ..config.rules import check_rule, trainable_keys
from ..privacy.clipping import update_norm, update_server_control
from ..tensors.adapters import check_tensors
from ..tensors.quantization import FULL_PRECISION, quantize_tensors
from ..tensors.rounding import round_tensors
from ..wire.messages import ClientFailure, ClientTask, ClientUpdate, LocalOptions, Payload, restore_tensors
from .admission import AcceptedUpdate, Admission
from .store import RoundStore


if TYPE_CHECKING:  # the server must not import what can open a model
    from ..processes.owner import Owner

TrainClients = Callable[[list[ClientTask]], Iterable[ClientUpdate | ClientFailure]]

# What may differ between a run and its resumption without changing what is computed.
_FREE_TO_CHANGE = {
    "output_dir", "overwrite", "resume_from_checkpoint", "compare_full_precision", "merge", "full_model", "report_to",
    "disable_tqdm", "run_name", "hub_token", "hub_model_id", "push_to_hub", "log_level", "audit", "audit_threshold",
    "audit_rows", "audit_steps", "audit_clients", "audit_coalitions", "client_workers", "client_timeout", "round_timeout",
    "hold_dequantized",
}  # fmt: skip
_SECRET = {"hub_token", "push_to_hub_token", "full_model"}


class FederatedServer:
    """Runs a federation over whatever `train_clients` reaches: this process, other ranks, or a network.

    `adapter` is θ before the first round; `num_examples` maps each client to its number of rows, where the server knows
    them, else to None. `evaluate_proxy` takes an adapter as a client would hold it and returns metrics on the base;
    `owner` is asked for the metrics of W + θ. After [`run`], `adapter` is the server's adapter.
    """

    def __init__(
        self,
        args: FederatedConfig,
        adapter: Mapping[str, torch.Tensor],
        peft_config: PeftConfig,
        num_examples: Mapping[str, int | None],
        base_fingerprint: str,
        *,
        owner: "Owner | None" = None,
        evaluate_proxy: Callable[[Mapping[str, torch.Tensor]], dict[str, float]] | None = None,
        on_round: Callable[[dict[str, Any]], None] | None = None,
    ):
        args.check_clients(len(num_examples))
        if args.control_variate and owner is None:
            raise ValueError(
                f"control_variate={args.control_variate}: only the owner's process can estimate it; set `full_model`."
            )
        check_rule(args.aggregation, broadcast=args.broadcast, num_rounds=args.num_rounds, peft_config=peft_config)
        self.args = args
        self.adapter = dict(adapter)
        self.peft_config = peft_config
        self.num_examples = dict(sorted(num_examples.items()))
        self.base_fingerprint = base_fingerprint
        self.owner = owner
        self.evaluate_proxy = evaluate_proxy
        self.on_round = on_round
        self.store = RoundStore(args.output_dir)
        self.optimizer = ServerOptimizer(
            args.server_optimizer,
            learning_rate=args.server_learning_rate,
            momentum=args.server_momentum,
            beta1=args.server_beta1,
            beta2=args.server_beta2,
            tau=args.server_tau,
        )
        self.admission = Admission(args, self.adapter, peft_config, self.num_examples, self.store.updates_dir)
        self.residual: dict[str, torch.Tensor] = {}
        self.federation_id = ""
        self.rounding_key = b""  # the owner's secret: what makes a client's rounding its own
        self._anchor: dict[str, torch.Tensor] = {}
        self._anchor_state: dict[str, torch.Tensor] = {}
        self._optimizer_state: dict[str, torch.Tensor] = {}
        self._control: dict[str, torch.Tensor] = {}
        self._window: dict[str, torch.Tensor] = {}
        self._window_rounds = 0

    def run(self, train_clients: TrainClients, resume: bool = False) -> list[dict[str, Any]]:
        """Run all rounds, or those that are left; returns the record of every round, round 0 being the state before.

        Raises:
            ValueError: if there is a federation in the way, or nothing to resume, or the one to resume differs.
            RuntimeError: if fewer than `min_clients` updates of a round were acceptable.
        """
        done = self._resume() if resume else self._begin()
        for number in range(done + 1, self.args.num_rounds + 1):
            self._run_round(number, train_clients)
        self.store.publish(*self.merged_adapter())
        return self.store.records()

    def sample_clients(self, number: int, attempt: int = 0) -> list[str]:
        """The clients of a round, uniform without replacement, a function of (seed, round, attempt) alone."""
        clients = list(self.num_examples)
        count = len(clients)
        if self.args.clients_per_round is not None:
            count = min(count, math.ceil(self.args.clients_per_round * (1 + self.args.over_sample)))
        generator = np.random.default_rng([self.args.seed, number] + [attempt] * bool(attempt))
        return [clients[index] for index in sorted(generator.choice(len(clients), count, replace=False))]

    def rank_of(self, client: str, number: int) -> int:
        """A client's LoRA rank in a round where it is lower than the server's, else 0. Override it to change over rounds."""
        ranks = self.args.client_ranks
        return int(ranks.get(client, 0)) if isinstance(ranks, dict) else 0

    def merged_adapter(self) -> tuple[dict[str, torch.Tensor], PeftConfig]:
        """The server's whole update as one plain adapter: what the adapter's rank can't hold makes its rank larger."""
        if not self.residual:
            return self.adapter, self.peft_config
        return join_residual(self.adapter, self.residual, self.peft_config)

    def make_proxy(self, adapter: Mapping[str, torch.Tensor], rank: int = 0, client: str = "") -> Payload:
        """The adapter as clients are sent it; `rank` is the client's, where it is lower than the server's.

        With `keyed_rounding`, `client` has a proxy of its own.
        """
        args = self.args
        if rank:
            adapter = truncate_adapter(adapter, self.peft_config, lower_rank(adapter, self.peft_config, rank))
        if args.adapter_bits == FULL_PRECISION:
            return dict(adapter)
        if args.keyed_rounding and client:
            return round_tensors(adapter, args.adapter_bits, args.adapter_block_size, self.rounding_key, client)
        return quantize_tensors(adapter, args.adapter_bits, args.adapter_block_size)

    def _begin(self, overwrite: bool = False) -> int:
        self.federation_id = secrets.token_hex(8)
        # No function of the seed, which the clients' configuration has, too.
        self.rounding_key = secrets.token_bytes(32) if self.args.keyed_rounding else b""
        self.store.create(self._describe(), overwrite or self.args.overwrite)
        if self.args.aggregation == "freeze_a" and self.args.broadcast_interval is not None:
            # Clients never move A, so the server's must be the one that they have.
            held = restore_tensors(self.make_proxy(self.adapter))
            self.adapter |= {key: held[key] for key in held.keys() - trainable_keys("freeze_a", 1, held)}
        self._start_window()
        self._commit(0, {"clients": {}, "rejected": {}, "asked": [], "bytes_down": 0, "bytes_up": 0, "seconds": 0.0})
        return 0

    def _resume(self) -> int:
        federation = self.store.read()
        done = self.store.latest()
        if done is None:
            return self._begin(overwrite=True)  # it was stopped before its first commit
        self.federation_id = federation["federation_id"]
        self.rounding_key = bytes.fromhex(federation["rounding_key"])
        now, then = json.loads(json.dumps(self._describe())), federation
        free = _FREE_TO_CHANGE | ({"num_rounds"} if self.args.learning_rate_horizon == "round" else set())
        for name, value in then["config"].items():
            if name not in free and now["config"].get(name) != value:
                raise ValueError(
                    f"This federation was begun with {name}={value!r}, now it is {now['config'].get(name)!r}. Resume "
                    "with the same configuration, or start another federation in another output_dir."
                )
        if then["base_fingerprint"] != self.base_fingerprint:
            raise ValueError("The base differs from the one that this federation was begun with.")
        adapter, state = self.store.load(done)
        check_tensors(adapter, self.adapter)
        self.adapter = adapter
        groups: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, value in state.items():
            if key != "window_rounds":
                group, name = key.split(":", 1)
                groups[group][name] = value
        self.residual, self._control = groups["residual"], groups["control"]
        self._optimizer_state = groups["optimizer"]
        self._window, self._window_rounds = groups["window"], int(state["window_rounds"])
        self._anchor, self._anchor_state = groups["anchor"] or adapter, groups["anchor_state"]
        return done

    def _start_window(self) -> None:
        self._anchor, self._anchor_state = self.adapter, self._optimizer_state
        self._window, self._window_rounds = {}, 0

    def _run_round(self, number: int, train_clients: TrainClients) -> None:
        began = time.perf_counter()
        interval = self.args.broadcast_interval
        if interval is not None and (number - 1) % interval == 0:
            self._start_window()
        # One for all clients of a rank, so that memory does not grow with their number; keyed rounding makes them differ.
        keyed = self.args.keyed_rounding
        proxy_of = functools.cache(
            lambda rank, client: None if interval is None else self.make_proxy(self._anchor, rank, client)
        )
        start_of = functools.cache(lambda rank, client: self._find_start(proxy_of(rank, client), rank))
        control = self.make_proxy(self._control)
        rejected: dict[str, str] = {}
        asked: set[str] = set()
        for attempt in range(self.args.round_attempts):
            tasks = {
                client: self._make_task(number, client, proxy_of, control)
                for client in self.sample_clients(number, attempt)
            }
            asked |= tasks.keys()
            updates, refused = self.admission.collect(tasks, train_clients(list(tasks.values())))
            rejected |= refused
            if len(updates) >= self.args.min_clients:
                break
        else:
            reasons = "; ".join(f"{client}: {reason}" for client, reason in rejected.items())
            raise RuntimeError(
                f"Round {number} has {len(updates)} acceptable updates; min_clients={self.args.min_clients}. {reasons}. "
                f"Rounds up to {number - 1} are committed: mend the cause and resume."
            )
        starts = [start_of(tasks[client].options.rank, client * keyed) for client in updates]
        repair: dict[str, torch.Tensor] = {}
        if self.args.control_variate and self.owner is not None:
            runs = range(self.args.control_variate_runs)
            seeds = [_seed(self.args.seed, number, f"owner {run}" if run else "owner") for run in runs]
            repair, share = self.owner.estimate_repair(start_of(0, ""), number, seeds)
        report = self._step(number, updates, starts, repair)
        if repair:
            report["repair_share"] = share  # of the mean of the owner's runs, that is no chance
        record = {
            "clients": {
                client: update.metrics | {"num_examples": update.num_examples} for client, update in updates.items()
            },
            "rejected": rejected,
            "asked": sorted(asked),  # whoever was asked has the proxy; the audit counts them
            "bytes_down": sum(len(task.to_bytes()) for task in tasks.values()),
            "bytes_up": sum(update.num_bytes for update in updates.values()),
            "seconds": time.perf_counter() - began,
            **report,
        }
        self._commit(number, record)
        self.admission.forget()

    def _find_start(self, proxy: Payload | None, rank: int) -> Mapping[str, torch.Tensor]:
        """What the update of a client of this rank is taken at, in the server's shapes."""
        if proxy is None:
            return self._anchor
        start = restore_tensors(proxy)
        if not rank:
            return start
        return pad_update(start, self.adapter, self.peft_config, lower_rank(self.adapter, self.peft_config, rank))

    def _make_task(
        self, number: int, client: str, proxy_of: Callable[[int, str], Payload | None], control: Payload
    ) -> ClientTask:
        args, rank = self.args, self.rank_of(client, number)
        return ClientTask(
            federation_id=self.federation_id,
            round=number,
            num_rounds=args.num_rounds,
            client_id=client,
            seed=_seed(args.seed, number, client),
            base_fingerprint=self.base_fingerprint,
            proxy=proxy_of(rank, client * args.keyed_rounding),
            options=LocalOptions(
                rule=args.aggregation,
                rank=rank,
                proximal_mu=args.fedprox_mu,
                scaffold=args.scaffold,
                clip_norm=args.clip_update_norm or 0.0,
                update_bits=args.update_bits,
                update_block_size=args.adapter_block_size,
                update_density=args.update_density,
                error_feedback=args.error_feedback,
            ),
            control=control,
        )

    def _step(
        self,
        number: int,
        updates: Mapping[str, AcceptedUpdate],
        starts: list[Mapping[str, torch.Tensor]],
        repair: Mapping[str, torch.Tensor],
    ) -> dict[str, Any]:
        """Aggregate a round's updates and move the server's adapter; returns what to record.

        `starts` are what the updates were taken at; `repair` is the owner's estimate of
        what in them repairs the base, if it makes one.
        """
        args = self.args
        result = aggregate(
            args.aggregation,
            [update.delta for update in updates.values()],
            [update.num_examples if args.weighting == "examples" else 1.0 for update in updates.values()],
            adapter=self._anchor,
            proxy=starts,
            peft_config=self.peft_config,
            round_number=number,
            residual=self.residual,
            residual_rank=args.residual_rank,
            robust=args.robust,
            num_attackers=args.num_attackers,
            mixed_ranks=bool(args.client_ranks),
        )
        self.residual = result.residual
        if args.scaffold:
            # Clients differ in their steps, and so Δ_i/steps_i is averaged: the mean of one step each.
            factors = [1 / (len(updates) * update.metrics["steps"]) for update in updates.values()]
            mean_step = sum_updates([update.delta for update in updates.values()], factors)
            share = len(updates) / len(self.num_examples)
            self._control = update_server_control(self._control, mean_step, 1, args.learning_rate, share)
        # Every Δ of a window is taken at the same proxy, so its rounds are averaged, not summed.
        delta = {
            key: value.double() - args.control_variate * repair.get(key, 0.0) for key, value in result.delta.items()
        }
        self._window = {key: self._window.get(key, 0) + value for key, value in delta.items()}
        self._window_rounds += 1
        mean = {key: (value / self._window_rounds).float() for key, value in self._window.items()}
        report = dict(result.report)
        if repair:
            report |= {"update_norm": update_norm(result.delta), "repair_norm": update_norm(repair)}
        if args.fit_server_step and self.owner is not None:
            report["server_step"] = self.owner.fit_step(self._anchor, mean)
            mean = {key: report["server_step"] * value for key, value in mean.items()}
        self.adapter, self._optimizer_state = self.optimizer.step(self._anchor, mean, self._anchor_state)
        return report

    def _commit(self, number: int, record: dict[str, Any]) -> None:
        metrics = {}
        if self.evaluate_proxy is not None and (number == 0 or self.args.broadcast_interval is not None):
            client = next(iter(self.num_examples))  # whose proxy, matters with keyed rounding alone
            metrics["proxy"] = self.evaluate_proxy(restore_tensors(self.make_proxy(self.adapter, client=client)))
        if self.owner is not None:
            metrics["server"] = self.owner.evaluate(self.adapter, self.residual)
        state = {f"optimizer:{key}": value for key, value in self._optimizer_state.items()}
        state["window_rounds"] = torch.tensor(self._window_rounds)
        for group, tensors in (("residual", self.residual), ("control", self._control)):
            state |= {f"{group}:{key}": value for key, value in tensors.items()}
        if self.args.broadcast_interval != 1:  # else every round starts a window of its own
            for group, tensors in (
                ("anchor", self._anchor),
                ("anchor_state", self._anchor_state),
                ("window", self._window),
            ):
                state |= {f"{group}:{key}": value for key, value in tensors.items()}
        record = {"round": number, **record, "metrics": metrics}
        self.store.commit(number, self.adapter, self.peft_config, state, record)
        if self.on_round is not None:
            self.on_round(record)

    def _describe(self) -> dict[str, Any]:
        config = {key: value for key, value in self.args.to_dict().items() if key not in _SECRET}
        packages = ("fedlpp_hf", "torch", "transformers", "accelerate", "peft", "bitsandbytes")
        return {
            "federation_id": self.federation_id,
            "base_fingerprint": self.base_fingerprint,
            "rounding_key": self.rounding_key.hex(),
            "clients": self.num_examples,
            "packages": {name: version(name) for name in packages},
            "config": config,
        }


def _seed(seed: int, number: int, client: str) -> int:
    """A client's seed in one round, a function of (seed, round, client) alone."""
    return int(np.random.SeedSequence([seed, number, zlib.crc32(client.encode())]).generate_state(1)[0] >> 1)
