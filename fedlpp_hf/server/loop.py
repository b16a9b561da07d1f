# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The server: the only round loop. It touches adapters only; no parameter of it could take a model."""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftConfig

from ..aggregation.optimizers import ServerOptimizer
from ..aggregation.products import join_residual
from ..config.federated import FederatedConfig
from ..config.rules import check_products, trainable_keys
from ..privacy.secure_sums.rounds import RoundSum
from ..tensors.adapters import check_tensors, scrub_config
from ..tensors.codebooks import FULL_PRECISION
from ..tensors.quantization import quantize_tensors
from ..wire.encoding import Payload, restore_tensors
from ..wire.messages import ClientFailure, ClientTask, ClientUpdate, LocalOptions
from .admission import AcceptedUpdate
from .best import check_chosen, find_published_round, forget_rounds
from .combine import combine_updates, scale_result
from .owner import Owner, Tensors, counted_wait
from .resume import check_resumable
from .sampling import make_seed, sample_clients
from .share_dp import make_dp
from .state import ServerState
from .step import MeanUpdate, check_owner, list_owner_seeds, take_step
from .store import RoundStore
from .sums import make_admission


TrainClients = Callable[[list[ClientTask]], Iterable[ClientUpdate | ClientFailure | RoundSum]]

_SECRET = {"hub_token", "push_to_hub_token", "full_model"}


class FederatedServer:
    """Runs a federation over whatever `train_clients` reaches: this process, other ranks, or a network.

    Args:
        args: The federation's options.
        adapter: θ before the first round, by key of a PEFT repository.
        peft_config: Of the adapter.
        num_examples: Rows of each client, or None where the server does not know them.
        base_fingerprint: Of the base that clients must hold.
        owner: Asked for the metrics of W − λE + θ, for the control variate, and to choose.
        evaluate_proxy: Takes an adapter as a client would hold it and returns metrics on the base.
        on_round: Called with the record of each committed round; where it returns True, that round is the run's last.

    Raises:
        ValueError: for options that this federation can't have.
    """

    def __init__(
        self,
        args: FederatedConfig,
        adapter: Mapping[str, torch.Tensor],
        peft_config: PeftConfig,
        num_examples: Mapping[str, int | None],
        base_fingerprint: str,
        *,
        owner: Owner | None = None,
        evaluate_proxy: Callable[[Mapping[str, torch.Tensor]], dict[str, float]] | None = None,
        on_round: Callable[[dict[str, Any]], bool | None] | None = None,
    ):
        args.check_clients(len(num_examples))
        check_products(args.aggregation, peft_config)
        check_owner(args, owner)
        self.args = args
        self.state = self.untrained = ServerState(dict(adapter))
        self.peft_config = peft_config
        self.num_examples = dict(sorted(num_examples.items()))
        self.base_fingerprint = base_fingerprint
        self.owner = owner
        self.evaluate_proxy = evaluate_proxy
        self.on_round = on_round
        # Asked before each round, whose number it is given: whether the rounds are over. It may wait first.
        self.is_over: Callable[[int], bool] = lambda number: False
        self.dropped: frozenset[str] = frozenset()  # clients that are not asked, from the next round on
        self.federation_id = ""
        # After the last round, which is not always the one that is published.
        self._committed: ServerState | None = None
        self._names: list[str] = []  # of metrics, in their order
        self.store = RoundStore(args.output_dir)
        self.optimizer = ServerOptimizer(args.server_optimizer, args.server_learning_rate, args.server_momentum)
        self.admission = make_admission(args, adapter, self.num_examples, self.store.updates_dir)
        self.dp = make_dp(args, list(self.num_examples), adapter, self.store)

    @property
    def adapter(self) -> Mapping[str, torch.Tensor]:
        """The server's adapter θ."""
        return self.state.adapter

    def run(self, train_clients: TrainClients, resume: bool = False) -> list[dict[str, Any]]:
        """Run all rounds, or those that are left; returns the record of every round, round 0 being the state before.

        The server's state is then that of the round with the least loss on the owner's selection rows, round 0 included; with
        `load_best_model_at_end`, of the best round; else of the last one. That state is published in `output_dir`.

        Raises:
            ValueError: if there is a federation in the way, or nothing to resume, or the one to resume differs.
            RuntimeError: if fewer than `min_clients` updates of a round were acceptable.
        """
        if resume:
            self.store.read()  # before the lock makes a directory
        with self.store.lock():
            done, stop = self._resume() if resume else self._begin()
            while done < self.args.num_rounds and not (stop or self.is_over(done + 1) or self._is_spent(done + 1)):
                done += 1
                stop = self._run_round(done, train_clients)
            records = self.store.records()
            published = find_published_round(self.args, records)
            if published != done:
                self.state = ServerState.from_tensors(*self.store.load(published))
            self.store.publish(*self.merged_adapter())
        return records

    def sample_clients(self, number: int) -> list[str]:
        """The clients of a round, uniform without replacement, a function of (seed, round) alone; with noise, see [`ClientDP`]."""
        if self.dp is not None and not self.args.secure_aggregation:
            return self.dp.draw_clients()
        return sample_clients(self.args, list(self.num_examples), number)

    def merged_adapter(self) -> tuple[dict[str, torch.Tensor], PeftConfig]:
        """The server's whole update as one plain adapter: what the adapter's rank can't hold makes its rank larger."""
        if not self.state.residual:
            return dict(self.adapter), self.peft_config
        return join_residual(self.adapter, self.state.residual, self.peft_config)

    def make_proxy(self, adapter: Mapping[str, torch.Tensor]) -> Payload:
        """The adapter as clients are sent it."""
        if self.args.adapter_bits == FULL_PRECISION:
            return dict(adapter)
        return quantize_tensors(adapter, self.args.adapter_bits, self.args.adapter_block_size)

    def client_adapter(self) -> dict[str, torch.Tensor] | None:
        """What clients hold after the last round: its proxy; None where nothing is broadcast, or nothing is committed."""
        if self._committed is None or not self.args.broadcasts:
            return None
        return restore_tensors(self.make_proxy(self._committed.adapter))

    def _is_spent(self, number: int) -> bool:
        return self.dp is not None and not self.dp.affords_round(number)

    def _begin(self, overwrite: bool = False) -> tuple[int, bool]:
        self.federation_id = secrets.token_hex(8)
        self.store.create(self._describe(), overwrite or self.args.overwrite)
        if self.dp is not None:
            self.dp.begin(self.federation_id)
        if self.args.aggregation == "freeze_a" and self.args.broadcasts:
            # Clients never move A, so the server's must be the one that they have.
            held = restore_tensors(self.make_proxy(self.adapter))
            frozen = {key: held[key] for key in held.keys() - trainable_keys("freeze_a", held)}
            self.state = ServerState(dict(self.adapter) | frozen)
        nothing: dict[str, Any] = {"clients": {}, "rejected": {}, "asked": []}
        nothing |= {"bytes_down": 0, "bytes_up": 0}
        if self.owner is not None and self.owner.selects:
            nothing["selection_loss"] = self.owner.measure_selection(self.adapter, {}, [0.0])[0]
        return 0, self._commit(0, nothing)

    def _resume(self) -> tuple[int, bool]:
        then = self.store.read()
        done = self.store.latest()
        if done is None:
            return self._begin(overwrite=True)  # it was stopped before its first commit
        self.federation_id = then["federation_id"]
        self.dropped = frozenset(self.store.read_dropped())
        check_resumable(then, self._describe(), self.args)
        state = ServerState.from_tensors(*self.store.load(done))
        check_tensors(state.adapter, self.adapter)
        self.state = self._committed = state
        self.untrained = ServerState.from_tensors(*self.store.load(0))
        records = self.store.records()
        if self.dp is not None:
            self.dp.resume(self.federation_id, records)
        self._names = list(records[0]["metrics"].get("proxy", ()))
        check_chosen(self.args, records[-1])
        self.store.check_kept(find_published_round(self.args, records))
        self.admission.sweep(done)  # a run that ended just after a commit has not tidied up
        forget_rounds(self.args, self.store)
        return done, False

    def _run_round(self, number: int, train_clients: TrainClients) -> bool:
        """Run and commit a round; returns whether it shall be the last."""
        began = time.perf_counter()
        proxy = self.make_proxy(self.adapter) if self.args.broadcasts else None  # one for all, whatever their number
        drawn, dropped = self.sample_clients(number), self.dropped
        tasks = {client: self.make_task(number, client, proxy) for client in drawn if client not in dropped}
        start = self.untrained.adapter if proxy is None else restore_tensors(proxy)
        # Not held while the clients train: of many clients and rounds they are large.
        seeds = list_owner_seeds(self.args, number, self.store.records() if self.args.control_variate else ())
        if self.owner is not None and seeds:
            self.owner.begin_variate(start, number, seeds)
        updates, rejected = self.admission.collect(tasks, train_clients(list(tasks.values())) if tasks else ())
        if len(updates) < self.args.min_clients and (self.dp is None or self.args.secure_aggregation):
            reasons = "; ".join(f"{client}: {reason}" for client, reason in rejected.items())
            raise RuntimeError(
                f"Round {number} has {len(updates)} acceptable updates; min_clients={self.args.min_clients}. {reasons}. "
                f"Rounds up to {number - 1} are committed: correct the cause and resume."
            )
        report = self._step(number, updates, start, seeds)
        record = {
            "clients": {
                client: update.metrics | {"num_examples": update.num_examples} for client, update in updates.items()
            },
            "rejected": rejected,
            "asked": sorted(tasks),  # whoever was asked has the proxy; the audit counts them
            "traffic": (traffic := self.admission.traffic),
            "bytes_down": sum(cost["bytes_down"] for cost in traffic.values()),
            "bytes_up": sum(update.num_bytes for update in updates.values()),
            **self.admission.report,
            **({"dropped": sorted(dropped)} if dropped else {}),
            **report,
        }
        stop = self._commit(number, record, began)
        self.admission.forget()
        forget_rounds(self.args, self.store)
        return stop

    def count_opening(self, number: int) -> None:
        """Told before the sum of a round is opened, so that no crash makes the account of its noise smaller."""
        if self.dp is not None:
            self.dp.begin_round(number)

    def make_task(self, number: int, client: str, proxy: Payload | None) -> ClientTask:
        """What `client` is asked in a round."""
        args = self.args
        noise = {"clip_norm": args.clip_update_norm or 0.0} if self.dp is None else self.dp.local_options()
        return ClientTask(
            federation_id=self.federation_id,
            round=number,
            num_rounds=args.num_rounds,
            client_id=client,
            seed=make_seed(args.seed, number, client),
            base_fingerprint=self.base_fingerprint,
            proxy=proxy,
            num_clients=args.clients_per_round or len(self.num_examples),
            noise_multiplier=0.0 if self.dp is None else self.dp.noise_multiplier,
            options=LocalOptions(
                rule=args.aggregation,
                proximal_mu=args.fedprox_mu,
                logit_adjustment=args.logit_adjustment,
                update_bits=args.update_bits,
                update_block_size=args.adapter_block_size,
                update_density=args.update_density,
                **noise,
            ),
        )

    def _step(
        self, number: int, updates: Mapping[str, AcceptedUpdate], start: Tensors, seeds: list[int]
    ) -> dict[str, Any]:
        """Aggregate a round's updates, taken at `start`, and move the server's adapter; returns what to record.

        Where nothing is broadcast they are whole ways from the untrained adapter, and so the server's step starts there, too.
        """
        args, before = self.args, self.state if self.args.broadcasts else self.untrained
        if self.dp is None:
            mean = combine_updates(args, updates, before, start, self.peft_config, self.store.records())
        else:
            mean = scale_result(self.dp.release(number, updates))
        self.state, report = take_step(
            args, self.owner, self.optimizer, before, MeanUpdate(number, mean, start, seeds)
        )
        return report

    def _commit(self, number: int, record: dict[str, Any], began: float | None = None) -> bool:
        """Measure and commit a round that began at `began`; returns whether it shall be the last."""
        metrics: dict[str, dict[str, Any]] = {}
        if self.evaluate_proxy is not None and (number == 0 or self.args.broadcasts):
            metrics["proxy"] = self.evaluate_proxy(restore_tensors(self.make_proxy(self.adapter)))
        if self.owner is not None:
            with counted_wait(record):
                found = self.owner.evaluate(self.adapter, self.state.residual, self.state.base_weight)
            # In the order of the trainer's evaluation, which says what the headline is; a message has its keys sorted.
            self._names += [name for name in metrics.get("proxy", ()) if name not in self._names]
            metrics["server"] = {name: found[name] for name in [*self._names, *found] if name in found}
        seconds = 0.0 if began is None else time.perf_counter() - began
        record = {"round": number, **record, "seconds": seconds, "metrics": metrics}
        if not number:
            check_chosen(self.args, record)
        self.store.commit(number, self.adapter, self.peft_config, self.state.to_tensors(), record)
        self._committed = self.state
        return self.on_round is not None and self.on_round(record) is True

    def _describe(self) -> dict[str, Any]:
        config = {key: value for key, value in self.args.to_dict().items() if key not in _SECRET}
        packages = ("fedlpp_hf", "torch", "transformers", "accelerate", "peft", "bitsandbytes")
        return {
            "federation_id": self.federation_id,
            "base_fingerprint": self.base_fingerprint,
            "peft_config": scrub_config(self.peft_config),
            "clients": self.num_examples,
            "packages": {name: version(name) for name in packages},
            "config": config,
        }
