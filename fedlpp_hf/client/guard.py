# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The client's guard and hook: makes sure that a run trains an adapter on a quantized base, and nothing else."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from peft import PeftConfig
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.utils import logging

from ..base.kernels import keep_layout_
from ..base.manifest import base_fingerprint
from ..config.rules import trainable_keys
from ..tensors.adapters import adapter_parameters, copy_adapter, global_norm, load_adapter_
from ..tensors.atomic import write_atomically
from ..tensors.codebooks import FULL_PRECISION
from ..wire.encoding import Payload
from ..wire.messages import ClientTask, ClientUpdate
from .checks import ADAPTER, check_model, find_manifest, find_peft_model
from .fedprox import add_proximal_gradient_
from .gate import ClientGate
from .logit_adjustment import adjust_logits
from .memory import ClientMemory
from .outgoing import describe_update, pack_update
from .partition import is_stream
from .policy import ClientPolicy


logger = logging.get_logger(__name__)

TASK_FILE = "task.safetensors"
UPDATE_FILE = "update.safetensors"


class BaseMovedError(RuntimeError):
    """The base is not what it was: what is trained on it from here on is worth nothing."""


class QuantizedBaseCallback(TrainerCallback):
    """Guards a client's run and turns it into an update.

    On init it audits the model: the base is quantized, only adapter parameters train. At train begin it checks that the
    task is for this base and loads the task's proxy in place; at train end it proves the base unmoved and makes the
    [`ClientUpdate`]. It refuses to push what belongs to a client.

    With `task_dir` and `update_dir` an unmodified `Trainer` or `SFTTrainer` script is a client: the task is read from
    `task_dir/task.safetensors` at train begin and the update is written to `update_dir/update.safetensors`. The script's
    own seed and arguments hold. [`FederatedTrainer`] hands it the task by [`accept`] and reads `update` instead.
    `memory_dir` is where a client keeps what it needs in its next round: what compression left of its updates (error
    feedback), or, where nothing is broadcast, its own adapter.

    `policy`, a [`ClientPolicy`] or the path of its YAML file, holds the client to its own conditions, whatever the task says;
    it needs `memory_dir`. With `dry_run` the update is made and described in the log, and not written.

    `allow_full_precision` lets an unquantized base pass: for the owner's own process, and for baselines.
    """

    def __init__(
        self,
        task_dir: str | os.PathLike | None = None,
        update_dir: str | os.PathLike | None = None,
        *,
        memory_dir: str | os.PathLike | None = None,
        policy: ClientPolicy | str | os.PathLike | None = None,
        dry_run: bool = False,
        allow_full_precision: bool = False,
    ):
        if (task_dir is None) != (update_dir is None):
            raise ValueError("`task_dir` and `update_dir` come together: one to read from, one to write to.")
        self.task_dir = None if task_dir is None else Path(task_dir)
        self.update_dir = None if update_dir is None else Path(update_dir)
        self.memory_dir = self.update_dir if memory_dir is None else Path(memory_dir)
        self.dry_run = dry_run
        self.gate: ClientGate | None = None
        if policy is not None:
            if memory_dir is None:
                raise ValueError(
                    "`policy` needs `memory_dir`: a directory that stays between rounds, for the client's ledger."
                )
            read = policy if isinstance(policy, ClientPolicy) else ClientPolicy.read(policy)
            if read.record_epsilon is not None and task_dir is not None:
                raise ValueError(
                    "record_epsilon needs FederatedTrainer: a callback can't replace a script's batches and gradients."
                )
            self.gate = ClientGate(read, Path(memory_dir), dry_run)
        self.allow_full_precision = allow_full_precision
        self.task: ClientTask | None = None
        self.update: ClientUpdate | None = None
        self.private_metrics: dict[str, float] = {}  # in place of those that tell rows without noise
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.trained = torch.nn.ParameterList()  # by the task's rule
        self.initial: dict[str, torch.Tensor] = {}
        self.fingerprint = ""
        self.frozen: list[tuple[str, torch.Tensor]] = []
        self._versions: list[int] = []
        self._digest = ""
        self._admitted: ClientTask | None = None
        self._start: dict[str, torch.Tensor] = {}
        self._hook: RemovableHandle | None = None  # that adjusts logits

    def on_init_end(self, args, state, control, *, model: Any, **kwargs):
        if args.push_to_hub and self.task_dir is not None:
            raise ValueError("push_to_hub=True: a client's files do not leave the client. Set it to False.")
        check_model(model, self.allow_full_precision)
        peft_model = find_peft_model(model)
        self.peft_config: PeftConfig = peft_model.peft_config[ADAPTER]
        self.parameters = adapter_parameters(peft_model)
        self.initial = copy_adapter(self.parameters)
        adapter = {id(parameter) for parameter in self.parameters.values()}
        self.frozen = [(name, p) for name, p in model.named_parameters() if id(p) not in adapter]
        keep_layout_(model)
        self._digest = self.digest_base()
        # A model that was quantized on the fly has no manifest; then its bits as loaded identify it.
        base = peft_model.get_base_model()
        self.fingerprint = self._digest if find_manifest(peft_model) is None else base_fingerprint(base)

    def restore_start(self, start: Mapping[str, torch.Tensor]) -> None:
        """Put the adapter back to `start` in float32, as it was before a trainer's constructor cast it."""
        for key, parameter in self.parameters.items():
            parameter.data = start[key].to(parameter.device, copy=True)
        self.initial = dict(start)

    def accept(self, task: ClientTask) -> None:
        """Take a task: check that it is for this base, and let only the parameters train which it asks for.

        A trainer that wraps its model (DDP) needs this before `train()`; [`FederatedTrainer`] does it.

        Raises:
            ValueError: if the task is for another base.
            PolicyRefusal: if the client's policy does not allow it.
        """
        if task.base_fingerprint != self.fingerprint:
            raise ValueError(
                f"The task is for the base {task.base_fingerprint[:12]}…, but this client holds "
                f"{self.fingerprint[:12]}…. Load the base that this federation shares."
            )
        if self.gate is not None and task is not self._admitted:
            self.admit(task)
        self.task, self.update, self._admitted = task, None, None
        trained = set(trainable_keys(task.options.rule, self.parameters))
        self.trained = torch.nn.ParameterList(p for key, p in self.parameters.items() if key in trained)
        for key, parameter in self.parameters.items():
            parameter.requires_grad_(key in trained)

    def admit(self, task: ClientTask) -> None:
        """Ask the client's policy, if there is one, before other ranks are told of the task. [`accept`] does it otherwise.

        Raises:
            PolicyRefusal: if the policy does not allow the task.
        """
        if self.gate is not None and PartialState().is_main_process:
            self.gate.admit(task, self.initial)
        self._admitted = task

    @torch.no_grad()
    def on_train_begin(self, args, state, control, *, model: torch.nn.Module, train_dataloader: Any, **kwargs):
        if self.task_dir is not None:
            task = _read_task(self.task_dir / TASK_FILE)
            if task.options.share_noise:
                raise ValueError(
                    f"The task in `{self.task_dir}` leaves the noise to the clients of a secure sum, and this callback writes "
                    "updates in the clear, without noise. Use `fedlpp-hf client` with secure_aggregation=True."
                )
            self.accept(task)
        if self.gate is not None:
            self.gate.policy.check_steps(state.max_steps)
        load_adapter_(self.parameters, self.current_task.proxy_tensors() or self.initial)
        # Read back, since an adapter that trains in bfloat16 starts at the rounded proxy.
        self._start = copy_adapter(self.parameters)
        if self.current_task.goes_on:
            load_adapter_(self.parameters, self._open_memory().read() or self.initial)
            if args.world_size > 1:  # only the first rank wrote it, perhaps on another machine
                broadcast([parameter.data for parameter in self.parameters.values()])
        self._versions = [parameter._version for _, parameter in self.frozen]
        self._remove_hook()  # of a run that raised
        if strength := self.current_task.options.logit_adjustment:
            self._hook = adjust_logits(find_peft_model(model), train_dataloader.dataset, strength)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if mu := self.current_task.options.proximal_mu:
            add_proximal_gradient_(self.parameters, self._start, mu)

    def on_train_end(self, args, state, control, *, model: torch.nn.Module, train_dataloader: Any, **kwargs):
        self._remove_hook()
        for (name, parameter), version in zip(self.frozen, self._versions, strict=True):
            if parameter._version != version:
                raise BaseMovedError(
                    f"`{name}` of the base was written to during training, but the base must stay frozen. Look for "
                    "code that changes the model: a callback, an optimizer with other parameters, a custom "
                    "training_step."
                )
        options, end = self.current_task.options, copy_adapter(self.parameters)
        if self.current_task.goes_on and state.is_world_process_zero:
            self._open_memory().write(end)
        delta = {key: end[key].sub_(self._start[key]) for key in trainable_keys(options.rule, end)}
        logs = [entry["train_loss"] for entry in state.log_history if "train_loss" in entry]
        metrics: dict[str, float] = {"loss": logs[-1] if logs else float("nan"), "steps": state.global_step}
        if options.clip_norm:  # what an adaptive clip follows
            metrics["clipped"] = float(global_norm(delta) > options.clip_norm)
        payload = self._pack(delta, keep=state.is_world_process_zero)
        self.update = ClientUpdate(
            federation_id=self.current_task.federation_id,
            round=self.current_task.round,
            client_id=self.current_task.client_id,
            base_fingerprint=self.fingerprint,
            num_examples=_count_examples(train_dataloader.dataset, args, state),
            delta=payload,
            metrics=metrics | self.private_metrics,
        )
        if self.gate is not None:
            self.gate.check_update(self.update, delta)
        if self.dry_run and state.is_world_process_zero:
            logger.warning(f"A dry run: nothing is sent.\n{describe_update(self.update, delta)}")
        elif self.update_dir is not None and state.is_world_process_zero:
            self.prove_base_unmoved()
            write_atomically(self.update_dir / UPDATE_FILE, self.update.to_bytes())

    def on_push_begin(self, args, state, control, **kwargs):
        if self.task_dir is not None:
            raise RuntimeError("A client's files do not leave the client: only the server's adapter may be pushed.")

    @property
    def current_task(self) -> ClientTask:
        """The task of the run under way.

        Raises:
            RuntimeError: if there is none.
        """
        if self.task is None:
            raise RuntimeError(
                "A client's run needs a task: pass `task_dir` and `update_dir` to QuantizedBaseCallback, or train "
                "through FederatedTrainer."
            )
        return self.task

    def _pack(self, delta: dict[str, torch.Tensor], keep: bool) -> Payload:
        """The update as it is sent. What compression left is kept for the next one, unless that is the whole way again."""
        task, clip = self.current_task, None if self.gate is None else self.gate.policy.clip_norm
        compresses = task.options.update_bits != FULL_PRECISION or task.options.update_density < 1
        memory = self._open_memory() if compresses and not task.goes_on else None
        payload, error = pack_update(delta, task.options, {} if memory is None else memory.read(), clip)
        if keep and self.gate is not None:
            self.gate.note_change(delta)
        if keep and memory is not None:
            memory.write(error)
        return payload

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _open_memory(self) -> ClientMemory:
        if self.memory_dir is None:
            raise ValueError(
                "In this federation a client keeps its own adapter, or the error of its last update, for its next "
                "round. Pass `memory_dir=` to QuantizedBaseCallback: a directory that stays between rounds."
            )
        return ClientMemory(self.memory_dir, self.current_task)

    def digest_base(self) -> str:
        """SHA-256 of every frozen parameter, as it is in memory now."""
        digest = hashlib.sha256()
        for name, parameter in self.frozen:
            digest.update(name.encode())
            # numpy has no bfloat16, so the bytes are taken as such; a 0-d parameter needs a dimension first.
            digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def prove_base_unmoved(self) -> None:
        """Compare the base with what it was when the trainer was made.

        Raises:
            BaseMovedError: if a bit of it differs.
        """
        if self.digest_base() != self._digest:
            raise BaseMovedError(
                "The base differs from what it was before training, but it must stay frozen. Look for code that "
                "changes the model: a callback, an optimizer with other parameters, a custom training_step."
            )


def _count_examples(rows: Any, args: Any, state: Any) -> int:
    """The client's rows; of a stream, as many as it has trained on."""
    if is_stream(rows):
        return state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return len(rows)


def _read_task(path: Path) -> ClientTask:
    if not path.is_file():
        raise ValueError(f"There is no task at `{path}`. The server writes it there before a client starts.")
    return ClientTask.from_bytes(path.read_bytes())
