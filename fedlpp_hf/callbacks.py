# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The client's guard and hook: makes sure that a run trains an adapter on a quantized base, and nothing else."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback
from transformers.utils import logging

from .adapters import adapter_parameters, copy_adapter, load_adapter_
from .base import BASE_MANIFEST, base_fingerprint, keep_layout_, read_manifest
from .messages import ClientTask, ClientUpdate


logger = logging.get_logger(__name__)

TASK_FILE = "task.safetensors"
UPDATE_FILE = "update.safetensors"


class QuantizedBaseCallback(TrainerCallback):
    """Guards a client's run and turns it into an update.

    On init it audits the model: the base is quantized, only adapter parameters train. At train begin it checks that the
    task is for this base and loads the task's proxy in place; at train end it proves the base unmoved and makes the
    [`ClientUpdate`]. It refuses to push what belongs to a client.

    With `task_dir` and `update_dir` an unmodified `Trainer` or `SFTTrainer` script is a client: the task is read from
    `task_dir/task.safetensors` at train begin and the update is written to `update_dir/update.safetensors`. The script's
    own seed and arguments hold. [`FederatedTrainer`] sets `task` and reads `update` instead.

    `allow_full_precision` lets an unquantized base pass: for the owner's own process, and for baselines.
    """

    def __init__(
        self,
        task_dir: str | os.PathLike | None = None,
        update_dir: str | os.PathLike | None = None,
        *,
        allow_full_precision: bool = False,
    ):
        if (task_dir is None) != (update_dir is None):
            raise ValueError("`task_dir` and `update_dir` come together: one to read from, one to write to.")
        self.task_dir = None if task_dir is None else Path(task_dir)
        self.update_dir = None if update_dir is None else Path(update_dir)
        self.allow_full_precision = allow_full_precision
        self.task: ClientTask | None = None
        self.update: ClientUpdate | None = None
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.initial: dict[str, torch.Tensor] = {}
        self.fingerprint = ""
        self._frozen: list[tuple[str, torch.Tensor]] = []
        self._versions: list[int] = []
        self._digest = ""
        self._start: dict[str, torch.Tensor] = {}

    def on_init_end(self, args, state, control, *, model: torch.nn.Module, **kwargs):
        if args.push_to_hub and self.task_dir is not None:
            raise ValueError("push_to_hub=True: a client's files do not leave the client. Set it to False.")
        audit_model(model, self.allow_full_precision)
        self.parameters = adapter_parameters(model)
        self.initial = copy_adapter(self.parameters)
        adapter = {id(parameter) for parameter in self.parameters.values()}
        self._frozen = [(name, p) for name, p in model.named_parameters() if id(p) not in adapter]
        keep_layout_(model)
        self._digest = self.digest_base()
        # A model that was quantized on the fly has no manifest; then its bits as loaded identify it.
        self.fingerprint = self._digest if find_manifest(model) is None else base_fingerprint(model.get_base_model())

    @torch.no_grad()
    def on_train_begin(self, args, state, control, *, model: torch.nn.Module, **kwargs):
        if self.task_dir is not None:
            self.task = _read_task(self.task_dir / TASK_FILE)
        if self.task is None:
            raise RuntimeError(
                "A client's run needs a task: pass `task_dir` and `update_dir` to QuantizedBaseCallback, or train "
                "through FederatedTrainer."
            )
        if self.task.base_fingerprint != self.fingerprint:
            raise ValueError(
                f"The task is for the base {self.task.base_fingerprint[:12]}…, but this client holds "
                f"{self.fingerprint[:12]}…. Load the base that this federation shares."
            )
        proxy = self.task.proxy_tensors()
        load_adapter_(self.parameters, self.initial if proxy is None else proxy)
        # Read back, since an adapter that trains in bfloat16 starts at the rounded proxy.
        self._start = copy_adapter(self.parameters)
        self._versions = [parameter._version for _, parameter in self._frozen]
        self.update = None

    def on_train_end(self, args, state, control, *, model: torch.nn.Module, train_dataloader: Any, **kwargs):
        for (name, parameter), version in zip(self._frozen, self._versions, strict=True):
            if parameter._version != version:
                raise RuntimeError(f"`{name}` of the base was written to during training; the base must stay frozen.")
        end = copy_adapter(self.parameters)
        delta = {key: end[key].sub_(self._start[key]) for key in end}
        logs = [entry["train_loss"] for entry in state.log_history if "train_loss" in entry]
        self.update = ClientUpdate(
            federation_id=self.task.federation_id,
            round=self.task.round,
            client_id=self.task.client_id,
            base_fingerprint=self.fingerprint,
            num_examples=len(train_dataloader.dataset),
            delta=delta,
            metrics={"loss": logs[-1] if logs else float("nan"), "steps": state.global_step},
        )
        if self.update_dir is not None and state.is_world_process_zero:
            self.prove_base_unmoved()
            self.update_dir.mkdir(parents=True, exist_ok=True)
            temporary = self.update_dir / f".{UPDATE_FILE}.tmp"
            temporary.write_bytes(self.update.to_bytes())
            os.replace(temporary, self.update_dir / UPDATE_FILE)

    def on_push_begin(self, args, state, control, **kwargs):
        if self.task_dir is not None:
            raise RuntimeError("A client's files do not leave the client: only the server's adapter may be pushed.")

    def digest_base(self) -> str:
        """SHA-256 of every frozen parameter, as it is in memory now."""
        digest = hashlib.sha256()
        for name, parameter in self._frozen:
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


def audit_model(model: torch.nn.Module, allow_full_precision: bool = False) -> None:
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


def full_precision_linears(model: PeftModel) -> list[str] | None:
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


def find_manifest(model: PeftModel) -> dict[str, Any] | None:
    """The manifest of the base that the model was loaded from, if it was loaded from a directory that has one."""
    directory = getattr(model.get_base_model().config, "_name_or_path", "")
    return read_manifest(directory) if directory and (Path(directory) / BASE_MANIFEST).is_file() else None


def _read_task(path: Path) -> ClientTask:
    if not path.is_file():
        raise ValueError(f"There is no task at `{path}`. The server writes it there before a client starts.")
    return ClientTask.from_bytes(path.read_bytes())
