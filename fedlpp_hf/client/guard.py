# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The client's guard and hook: makes sure that a run trains an adapter on a quantized base, and nothing else."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save
from transformers import TrainerCallback
from transformers.utils import logging

from ..aggregation.products import lower_rank, pad_update, truncate_adapter
from ..base.kernels import keep_layout_
from ..base.manifest import BASE_MANIFEST, base_fingerprint, read_manifest
from ..config.rules import trainable_keys
from ..privacy.clipping import add_control_gradient_, add_proximal_gradient_, clip_update, update_client_control
from ..tensors.adapters import adapter_parameters, copy_adapter, load_adapter_, split_tensors
from ..tensors.atomic import write_atomically
from ..tensors.quantization import FULL_PRECISION
from ..wire.compression import compress_update
from ..wire.messages import ClientTask, ClientUpdate, Payload, restore_tensors


logger = logging.get_logger(__name__)

TASK_FILE = "task.safetensors"
UPDATE_FILE = "update.safetensors"
CONTROL, ERROR = "control:", "error:"


class QuantizedBaseCallback(TrainerCallback):
    """Guards a client's run and turns it into an update.

    On init it audits the model: the base is quantized, only adapter parameters train. At train begin it checks that the
    task is for this base and loads the task's proxy in place; at train end it proves the base unmoved and makes the
    [`ClientUpdate`]. It refuses to push what belongs to a client.

    With `task_dir` and `update_dir` an unmodified `Trainer` or `SFTTrainer` script is a client: the task is read from
    `task_dir/task.safetensors` at train begin and the update is written to `update_dir/update.safetensors`. The script's
    own seed and arguments hold. [`FederatedTrainer`] hands it the task by [`accept`] and reads `update` instead.
    `memory_dir` is where a client keeps what error feedback and SCAFFOLD carry from round to round.

    `allow_full_precision` lets an unquantized base pass: for the owner's own process, and for baselines.
    """

    def __init__(
        self,
        task_dir: str | os.PathLike | None = None,
        update_dir: str | os.PathLike | None = None,
        *,
        memory_dir: str | os.PathLike | None = None,
        allow_full_precision: bool = False,
    ):
        if (task_dir is None) != (update_dir is None):
            raise ValueError("`task_dir` and `update_dir` come together: one to read from, one to write to.")
        self.task_dir = None if task_dir is None else Path(task_dir)
        self.update_dir = None if update_dir is None else Path(update_dir)
        self.memory_dir = self.update_dir if memory_dir is None else Path(memory_dir)
        self.allow_full_precision = allow_full_precision
        self.task: ClientTask | None = None
        self.update: ClientUpdate | None = None
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.initial: dict[str, torch.Tensor] = {}
        self.fingerprint = ""
        self.frozen: list[tuple[str, torch.Tensor]] = []
        self._versions: list[int] = []
        self._digest = ""
        self._start: dict[str, torch.Tensor] = {}
        self._control: dict[str, torch.Tensor] = {}
        self._memory: dict[str, torch.Tensor] = {}

    def on_init_end(self, args, state, control, *, model: Any, **kwargs):
        if args.push_to_hub and self.task_dir is not None:
            raise ValueError("push_to_hub=True: a client's files do not leave the client. Set it to False.")
        audit_model(model, self.allow_full_precision)
        self.peft_config: PeftConfig = model.peft_config["default"]
        self.parameters = adapter_parameters(model)
        self.initial = copy_adapter(self.parameters)
        adapter = {id(parameter) for parameter in self.parameters.values()}
        self.frozen = [(name, p) for name, p in model.named_parameters() if id(p) not in adapter]
        keep_layout_(model)
        self._digest = self.digest_base()
        # A model that was quantized on the fly has no manifest; then its bits as loaded identify it.
        self.fingerprint = self._digest if find_manifest(model) is None else base_fingerprint(model.get_base_model())

    def accept(self, task: ClientTask) -> None:
        """Take a task: check that it is for this base, and let only those parameters train that it asks for.

        A trainer that wraps its model (DDP) needs this before `train()`; [`FederatedTrainer`] does it.

        Raises:
            ValueError: if the task is for another base.
        """
        if task.base_fingerprint != self.fingerprint:
            raise ValueError(
                f"The task is for the base {task.base_fingerprint[:12]}…, but this client holds "
                f"{self.fingerprint[:12]}…. Load the base that this federation shares."
            )
        self.task, self.update = task, None
        trained = set(trainable_keys(task.options.rule, task.round, self.parameters))
        for key, parameter in self.parameters.items():
            parameter.requires_grad_(key in trained)

    @torch.no_grad()
    def on_train_begin(self, args, state, control, *, model: torch.nn.Module, **kwargs):
        if self.task_dir is not None:
            self.accept(_read_task(self.task_dir / TASK_FILE))
        start = self.current_task.proxy_tensors() or self.initial
        if self._low_rank is not None:  # with zeros beyond its rank, a factor's gradient there is zero, too
            start = truncate_adapter(start, *self._low_rank) if start is self.initial else start
            start = pad_update(start, self.initial, *self._low_rank)
        load_adapter_(self.parameters, start)
        # Read back, since an adapter that trains in bfloat16 starts at the rounded proxy.
        self._start = copy_adapter(self.parameters)
        self._versions = [parameter._version for _, parameter in self.frozen]
        self._memory = self._recall() if self._remembers else {}
        self._control = restore_tensors(self.current_task.control)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        options = self.current_task.options
        if options.proximal_mu:
            add_proximal_gradient_(self.parameters, self._start, options.proximal_mu)
        if options.scaffold:
            add_control_gradient_(self.parameters, self._control, split_tensors(self._memory, CONTROL))

    def on_train_end(self, args, state, control, *, model: torch.nn.Module, train_dataloader: Any, **kwargs):
        for (name, parameter), version in zip(self.frozen, self._versions, strict=True):
            if parameter._version != version:
                raise RuntimeError(f"`{name}` of the base was written to during training; the base must stay frozen.")
        options, end = self.current_task.options, copy_adapter(self.parameters)
        delta = {key: end[key].sub_(self._start[key]) for key in end}
        if self._low_rank is not None:
            delta = truncate_adapter(delta, *self._low_rank)
        delta = {key: delta[key] for key in trainable_keys(options.rule, self.current_task.round, delta)}
        if options.scaffold:
            own = update_client_control(
                split_tensors(self._memory, CONTROL), self._control, delta, state.global_step, args.learning_rate
            )
            self._memory |= {CONTROL + key: value for key, value in own.items()}
        if options.clip_norm:
            delta, _ = clip_update(delta, options.clip_norm)
        payload: Payload = delta
        if options.update_bits != FULL_PRECISION or options.update_density < 1:
            payload, error = compress_update(
                delta,
                options.update_bits,
                options.update_block_size,
                options.update_density,
                split_tensors(self._memory, ERROR) if options.error_feedback else None,
            )
            self._memory |= {ERROR + key: value for key, value in error.items()}
        if self._remembers and state.is_world_process_zero:
            self._remember()
        logs = [entry["train_loss"] for entry in state.log_history if "train_loss" in entry]
        self.update = ClientUpdate(
            federation_id=self.current_task.federation_id,
            round=self.current_task.round,
            client_id=self.current_task.client_id,
            base_fingerprint=self.fingerprint,
            num_examples=len(train_dataloader.dataset),
            delta=payload,
            metrics={"loss": logs[-1] if logs else float("nan"), "steps": state.global_step},
        )
        if self.update_dir is not None and state.is_world_process_zero:
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

    @property
    def _low_rank(self) -> tuple[PeftConfig, PeftConfig] | None:
        """The server's and this client's adapter configuration, where the client's rank is the lower one."""
        if not self.current_task.options.rank:
            return None
        return self.peft_config, lower_rank(self.initial, self.peft_config, self.current_task.options.rank)

    @property
    def _remembers(self) -> bool:
        options = self.current_task.options
        compresses = options.update_bits != FULL_PRECISION or options.update_density < 1
        return options.scaffold or (options.error_feedback and compresses)

    def _memory_file(self, number: int) -> Path:
        """Where a client keeps, from one round to a later one, what is its own. Client ids are the server's: never a path."""
        if self.memory_dir is None:
            raise ValueError("Error feedback and SCAFFOLD need a place that is the client's own; pass `memory_dir`.")
        client = hashlib.sha256(
            f"{self.current_task.federation_id}/{self.current_task.client_id}".encode()
        ).hexdigest()[:32]
        return self.memory_dir / client / f"round-{number:05d}.safetensors"

    def _recall(self) -> dict[str, torch.Tensor]:
        """What this client kept in its last round before the task's: a resumed federation may go back a round."""
        files = sorted(self._memory_file(0).parent.glob("round-*.safetensors"))
        earlier = [file for file in files if file < self._memory_file(self.current_task.round)]
        return load_file(earlier[-1]) if earlier else {}

    def _remember(self) -> None:
        file = self._memory_file(self.current_task.round)
        write_atomically(file, save(self._memory))
        for old in sorted(other for other in file.parent.glob("round-*.safetensors") if other < file)[:-1]:
            old.unlink()

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
            RuntimeError: if a bit of it differs.
        """
        if self.digest_base() != self._digest:
            raise RuntimeError("The base differs from what it was before training; it must stay frozen.")


def audit_model(model: Any, allow_full_precision: bool = False) -> None:
    """Refuse a model that is not an adapter on a quantized base.

    Raises:
        ValueError: if there is no adapter, the base is not quantized, or anything but the adapter is trainable.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"The model is a {type(model).__name__} without an adapter; a client trains nothing but LoRA. "
            "Pass `peft_config=LoraConfig(...)`, or a PeftModel."
        )
    adapter = {id(parameter) for parameter in adapter_parameters(model).values()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapter]
    if trainable:
        raise ValueError(
            f"`{trainable[0]}` is trainable and {len(trainable) - 1} more outside the adapter; a client may only "
            "train LoRA factors and `modules_to_save`."
        )
    if allow_full_precision:
        return
    linears = full_precision_linears(model)
    if linears is None:
        name = getattr(model.get_base_model().config, "_name_or_path", "") or type(model.get_base_model()).__name__
        raise ValueError(
            f"model='{name}' is a full-precision checkpoint; clients may only load a quantized base. Run `fedlpp-hf "
            f"quantize {name} base/` and load `base/`, pass `quantization_config`, or name it as `full_model` so that "
            "the owner's process exports the base."
        )
    if linears:
        logger.warning(
            f"{len(linears)} linear layers of the base are in full precision ({', '.join(linears[:3])}). Whoever holds "
            "this base holds them. A base written by `fedlpp-hf quantize` does not have this leak."
        )


def full_precision_linears(model: Any) -> list[str] | None:
    """Names of the base's linear layers that hold full-precision weights; None if the base has no quantized layer."""
    import bitsandbytes as bnb  # heavy, and not needed to import the package

    base = model.get_base_model()
    quantized = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    if not any(isinstance(module, quantized) for module in base.modules()):
        return None
    manifest = find_manifest(model)
    if manifest is not None:  # it knows what `export_base` reduced of the layers that bitsandbytes leaves alone
        return manifest["full_precision_linears"]
    trained = ("lora_", "modules_to_save", "original_module")
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not isinstance(module, quantized)
        and not any(part in name for part in trained)
    ]


def find_manifest(model: Any) -> dict[str, Any] | None:
    """The manifest of the base that the model was loaded from, if it was loaded from a directory that has one."""
    directory = getattr(model.get_base_model().config, "_name_or_path", "")
    return read_manifest(directory) if directory and (Path(directory) / BASE_MANIFEST).is_file() else None


def _read_task(path: Path) -> ClientTask:
    if not path.is_file():
        raise ValueError(f"There is no task at `{path}`. The server writes it there before a client starts.")
    return ClientTask.from_bytes(path.read_bytes())
