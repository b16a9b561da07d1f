# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Configuration of a federation: one dataclass on top of `TrainingArguments`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..tensors.quantization import FULL_PRECISION, check_bits
from .rules import check_rule


logger = logging.get_logger(__name__)


def check_bits_or_full(bits: int, option: str) -> None:
    """Refuse anything but a codebook's bits or 32, which stands for full precision.

    Raises:
        ValueError: naming the option.
    """
    if bits == FULL_PRECISION:
        return
    try:
        check_bits(bits)
    except ValueError as error:
        raise ValueError(f"`{option}`: {error} 32 leaves full precision.") from None


@dataclass
class FederatedConfig(TrainingArguments):
    """Arguments of a federation, on top of [`~transformers.TrainingArguments`], which describe one client's local run.

    `num_train_epochs` (1 by default) or `max_steps`, the optimizer, the schedule and the batch size hold for each client
    and round. Local runs neither checkpoint nor evaluate: the federation commits and evaluates every round.
    """

    num_train_epochs: float = field(default=1.0, metadata={"help": "Local epochs of each client in each round."})

    num_rounds: int = field(default=10, metadata={"help": "Rounds of the federation."})
    num_clients: int | None = field(
        default=None,
        metadata={
            "help": "Clients. Needed where `partition` is iid or dirichlet; natural clients bring their number."
        },
    )
    clients_per_round: int | None = field(
        default=None, metadata={"help": "Clients drawn in each round, uniformly without replacement. All by default."}
    )
    min_clients: int = field(
        default=1, metadata={"help": "A round with fewer accepted updates fails, and the federation stops there."}
    )
    partition: str = field(
        default="iid",
        metadata={
            "help": "How a dataset becomes clients: iid, dirichlet, or the name of a column of natural clients."
        },
    )
    dirichlet_alpha: float = field(
        default=0.5, metadata={"help": "Concentration of the Dirichlet partition: small means clients that differ."}
    )
    dirichlet_column: str = field(
        default="label", metadata={"help": "Column whose values the Dirichlet partition distributes unevenly."}
    )

    full_model: str | None = field(
        default=None,
        metadata={
            "help": "Path or Hub id of the owner's full-precision model. Only the owner's process opens it: it exports "
            "the base, evaluates the server's model in each round and merges at the end."
        },
    )
    base_bits: int = field(
        default=4,
        metadata={
            "help": "Bits of the base's weights: 4, 3, 2, 1 (ternary), 8. 32 leaves full precision: no privacy."
        },
    )
    base_block_size: int = field(default=64, metadata={"help": "Weights that share one scale in the base."})
    double_quant: bool = field(default=False, metadata={"help": "Quantize the base's scales, too (QLoRA)."})
    embedding_bits: int = field(
        default=4, metadata={"help": "Bits of embeddings and heads in the base. 32 gives them away in full precision."}
    )
    adapter_bits: int = field(
        default=4, metadata={"help": "Bits of the proxy, the adapter that clients are sent. 32: full precision."}
    )
    adapter_block_size: int = field(default=256, metadata={"help": "Adapter values that share one scale."})

    keyed_rounding: bool = field(
        default=False,
        metadata={
            "help": "Round each client's proxy up or down by chances of its own, which a secret of the owner's makes and no "
            "round changes: then neither its own proxies of many rounds nor those of few other clients average to more."
        },
    )

    broadcast: str = field(
        default="every_round",
        metadata={
            "help": "When the proxy is sent: every_round, a number k (every k rounds), or never: every client starts "
            "from the untouched base, and what is never sent can't be stolen."
        },
    )
    weighting: str = field(
        default="examples", metadata={"help": "Weight of an update in the mean: examples, or uniform."}
    )
    aggregation: str = field(
        default="fedavg",
        metadata={
            "help": "fedavg (mean of the factors), freeze_a, alternate, exact (mean of the products B·A), stack. "
            "docs/aggregation.md has the table of what each does and does not."
        },
    )
    residual_rank: int = field(
        default=64, metadata={"help": "Rank of what `exact` keeps on the server because the adapter can't hold it."}
    )
    client_ranks: dict | str | None = field(
        default=None,
        metadata={"help": 'LoRA ranks of clients with a lower one than the server\'s, as {"client": rank}.'},
    )
    robust: str = field(
        default="none",
        metadata={"help": "none, norm_clipping, median, trimmed_mean, krum, multi_krum, geometric_median."},
    )
    num_attackers: int = field(
        default=0, metadata={"help": "Attackers in a round that a robust rule shall withstand."}
    )
    max_update_norm: float | None = field(
        default=None, metadata={"help": "The server rejects an update that is longer than this."}
    )
    clip_update_norm: float | None = field(
        default=None, metadata={"help": "Clients scale an update that is longer than this down to it."}
    )
    fedprox_mu: float = field(default=0.0, metadata={"help": "Weight of FedProx's pull towards the proxy."})
    scaffold: bool = field(
        default=False,
        metadata={"help": "Correct clients' drift (SCAFFOLD). It needs plain SGD as the local optimizer."},
    )
    update_bits: int = field(
        default=32, metadata={"help": "Bits of the updates that clients send. 32: full precision."}
    )
    update_density: float = field(
        default=1.0, metadata={"help": "Share of values that clients send of each tensor, those of largest magnitude."}
    )
    error_feedback: bool = field(
        default=True, metadata={"help": "Clients add what compression took from an update to their next one."}
    )
    over_sample: float = field(
        default=0.0,
        metadata={
            "help": "Share of clients asked beyond clients_per_round; the round closes when enough have answered."
        },
    )
    round_attempts: int = field(
        default=1, metadata={"help": "How often a round with fewer than min_clients updates is tried before it fails."}
    )

    server_optimizer: str = field(default="sgd", metadata={"help": "sgd, adam, yogi or adagrad (FedOpt)."})
    server_beta1: float = field(
        default=0.9, metadata={"help": "First-moment decay of the adaptive server optimizers."}
    )
    server_beta2: float = field(default=0.99, metadata={"help": "Second-moment decay of adam and yogi on the server."})
    server_tau: float = field(default=1e-3, metadata={"help": "Adaptivity of the adaptive server optimizers."})
    server_learning_rate: float = field(
        default=1.0,
        metadata={"help": "Step of the server along the mean update. 1 with momentum 0 is the paper's rule."},
    )
    server_momentum: float = field(default=0.0, metadata={"help": "Momentum of the server (FedAvgM)."})
    fit_server_step: bool = field(
        default=False,
        metadata={"help": "Let the owner choose the step on its own data (`owner_dataset`), for broadcast=never."},
    )
    control_variate: float = field(
        default=0.0,
        metadata={
            "help": "Subtract so much of what the quantizer made of the update, as the owner estimates it: in each round it "
            "trains on its own data (`owner_dataset`) from the base and from the full model. 1: all of it; 0: none."
        },
    )
    control_variate_runs: int = field(
        default=1,
        metadata={
            "help": "Pairs of runs, with other batches and dropout, that the owner's estimate is the mean of. Several take "
            "chance out of it, at the owner's cost alone; 4 is a good number."
        },
    )
    learning_rate_horizon: str = field(
        default="round",
        metadata={"help": "What the local schedule runs over: the client's round, or the whole federation."},
    )

    compare_full_precision: bool = field(
        default=False,
        metadata={
            "help": "Also run the federation without quantization, as the reference of the report, and, with an "
            "`owner_dataset`, the owner alone on its rows. It needs the full model and the clients' data in one process: "
            "for simulations only."
        },
    )
    audit: bool = field(
        default=False,
        metadata={
            "help": "At the end, let clients attack with what they hold, and report how much of the owner's gain they "
            "have. It needs the clients' data here: for simulations only. docs/threat-model.md explains the result."
        },
    )
    audit_threshold: float | None = field(
        default=None,
        metadata={"help": "Fail the run if a client, or a coalition of half of them, has a larger share of the gain."},
    )
    audit_rows: int = field(default=128, metadata={"help": "Evaluation rows that the audit compares models on."})
    audit_steps: int = field(
        default=20, metadata={"help": "Steps that an attacker trains on its own rows, and local-only training has."}
    )
    audit_clients: int = field(
        default=1, metadata={"help": "Clients that attack alone, those first that hold the most proxies and rows."}
    )
    audit_coalitions: str = field(
        default="half",
        metadata={"help": "Coalitions that attack: half (of all clients), or all (the strongest 2, 3, … of them)."},
    )
    hold_dequantized: bool = field(
        default=False,
        metadata={
            "help": "Hold the base's weights as floats during a client's run: a little faster for four more bytes per "
            "weight (two in 16 bits), to the same bits on a CPU."
        },
    )
    client_workers: int = field(
        default=1,
        metadata={
            "help": "Processes that train a round's clients side by side on this machine, each with its own base. 1: "
            "this process trains them one after the other."
        },
    )
    round_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that a round's clients have: it closes with the updates that came. Over Flower 3600 by default."
        },
    )
    client_timeout: float | None = field(
        default=None, metadata={"help": "Seconds after which a worker gives a client's run up; the client has failed."}
    )
    merge: bool = field(
        default=True, metadata={"help": "At the end, write the merged full model to output_dir/_merged."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete a federation that `output_dir` already holds."})

    def __post_init__(self):
        super().__post_init__()
        if self.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy={self.eval_strategy!r}: local runs do not evaluate. Leave it at 'no'; the federation "
                "evaluates in every round, on `eval_dataset`."
            )
        self.save_strategy = "no"
        self.load_best_model_at_end = False
        # Several GPUs in one process mean nn.DataParallel to a Trainer: the base copied in every step, batches n times as
        # large. Ranks (`torchrun`) and `client_workers` have one GPU each.
        self._n_gpu = min(self.n_gpu, 1)
        for option in ("base_bits", "embedding_bits", "adapter_bits", "update_bits"):
            check_bits_or_full(getattr(self, option), option)
        self._check_positive("num_rounds", "min_clients", "base_block_size", "adapter_block_size", "dirichlet_alpha")
        self._check_positive(
            "round_attempts",
            "residual_rank",
            "audit_rows",
            "audit_steps",
            "audit_clients",
            "client_workers",
            "control_variate_runs",
        )
        self._check_positive(
            "num_clients", "clients_per_round", "max_update_norm", "clip_update_norm", "client_timeout", optional=True
        )
        self._check_positive("round_timeout", optional=True)
        if isinstance(self.client_ranks, str):
            self.client_ranks = json.loads(self.client_ranks)
        if self.over_sample and self.clients_per_round is None:
            raise ValueError(f"over_sample={self.over_sample} needs clients_per_round: all clients are asked already.")
        plain_sgd = self.optim in ("sgd", OptimizerNames.SGD) and self.lr_scheduler_type == SchedulerType.CONSTANT
        if self.scaffold and (not plain_sgd or self.clip_update_norm):
            raise ValueError(
                "scaffold=True corrects steps of plain SGD at a constant learning rate, unclipped. Set optim='sgd' and "
                "lr_scheduler_type='constant', and leave clip_update_norm out."
            )
        if self.bf16 and self.device.type == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16"):
            logger.warning("bf16=True on a CPU without AVX512-bf16 is many times slower than float32; leave it out.")
        self._check_choice("weighting", ("examples", "uniform"))
        if self.client_timeout is not None and self.client_workers == 1:
            raise ValueError("client_timeout needs client_workers of 2 or more: this process can't end its own run.")
        if self.audit_threshold is not None and not self.audit:
            raise ValueError(f"audit_threshold={self.audit_threshold} without an audit; set audit=True.")
        self._check_choice("audit_coalitions", ("half", "all"))
        self._check_choice("learning_rate_horizon", ("round", "federation"))
        if self.num_clients is None and self.partition in ("iid", "dirichlet"):
            self.num_clients = 8
        if self.num_clients is not None:
            self.check_clients(self.num_clients)
        self.broadcast = str(self.broadcast)
        if self.broadcast not in ("every_round", "never") and not (
            self.broadcast.isdecimal() and int(self.broadcast) > 0
        ):
            raise ValueError(
                f"broadcast={self.broadcast!r}; expected every_round, never, or a positive number of rounds."
            )

        if self.keyed_rounding and (self.adapter_bits == FULL_PRECISION or self.broadcast == "never"):
            raise ValueError(
                f"keyed_rounding=True with adapter_bits={self.adapter_bits} and broadcast={self.broadcast!r}: there is no "
                "proxy that could be rounded. Leave it out."
            )
        check_rule(
            self.aggregation,
            robust=self.robust,
            num_attackers=self.num_attackers,
            min_clients=self.min_clients,
            clients_per_round=self.clients_per_round or self.num_clients,
            weighting=self.weighting,
            server_optimizer=self.server_optimizer,
            server_learning_rate=self.server_learning_rate,
            server_momentum=self.server_momentum,
            broadcast=self.broadcast,
            num_rounds=self.num_rounds,
            fit_server_step=self.fit_server_step,
            control_variate=self.control_variate,
            keyed_rounding=self.keyed_rounding,
        )

    def check_clients(self, num_clients: int) -> None:
        """Refuse rounds that want more clients than there are.

        Raises:
            ValueError: naming both numbers.
        """
        for option in ("clients_per_round", "min_clients"):
            wanted = getattr(self, option)
            if wanted is not None and wanted > num_clients:
                raise ValueError(f"{option}={wanted}, but there are only {num_clients} clients. Lower {option}.")

    @property
    def broadcast_interval(self) -> int | None:
        """Rounds from one broadcast to the next, or None where nothing is ever broadcast."""
        return {"every_round": 1, "never": None}.get(
            self.broadcast, int(self.broadcast) if self.broadcast[0].isdecimal() else None
        )

    def _check_positive(self, *options: str, optional: bool = False) -> None:
        for option in options:
            value = getattr(self, option)
            if not (value is None and optional) and not value > 0:
                raise ValueError(f"{option}={value}; expected a positive number.")

    def _check_choice(self, option: str, choices: Sequence[str]) -> None:
        if getattr(self, option) not in choices:
            raise ValueError(f"{option}={getattr(self, option)!r}; expected one of {', '.join(choices)}.")
