# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""DP-SGD's gradient: each record's own, clipped, summed, with noise (arXiv 1607.00133), by the hooks of Opacus.

A record is a row. Its loss is the mean over its own labels, so that no other row of the batch changes it: the loss of a batch is
the mean over all N labels in it, and the gradient of record i of it is multiplied by N / nᵢ before it is clipped.
"""

import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..config.extras import install_command
from ..privacy.noise import ReadBytes, draw_gaussian, draw_uniform
from .checks import find_peft_model


Inputs = Mapping[str, Any]
ComputeLoss = Callable[[dict[str, Any]], torch.Tensor]

_IGNORED = -100


class PoissonBatches:
    """Batches of row numbers for a DataLoader: in each step every row is in by itself with probability `rate`.

    A step's rows come in `parts` of about equal size, some of them empty. The draw is secret: the task's seed is the server's.

    Args:
        num_rows: The client's rows.
        rate: Chance of a row to be in a step.
        steps: Steps of an epoch.
        parts: Batches of a step.
        read_bytes: Source of randomness.
    """

    def __init__(
        self, num_rows: int, rate: float, steps: int, parts: int, read_bytes: ReadBytes = secrets.token_bytes
    ):
        self.num_rows, self.rate, self.steps, self.parts, self.read_bytes = num_rows, rate, steps, parts, read_bytes

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            rows = (draw_uniform(self.num_rows, self.read_bytes) < self.rate).nonzero()[0].tolist()
            yield from (rows[part :: self.parts] for part in range(self.parts))


class RecordGradients:
    """Collects clipped gradients of single records, and turns their sum into a step's noisy gradient.

    Args:
        model: That trains, with its adapter.
        parameters: That train: weights and biases of plain linear layers.
        clip: Norm to which each record's gradient is scaled down.
        noise_multiplier: Standard deviation of the noise on the sum, over the clip.
        expected: Records of a step, on average; a public number that the sum is divided by.
        read_bytes: Source of the noise.

    Raises:
        ValueError: for a model of which gradients of single records can't be had, or without Opacus.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Sequence[torch.nn.Parameter],
        clip: float,
        noise_multiplier: float,
        expected: float,
        read_bytes: ReadBytes = secrets.token_bytes,
    ):
        check_record_model(model)
        self.model, self.parameters = model, list(parameters)
        self.clip, self.noise_multiplier, self.expected, self.read_bytes = clip, noise_multiplier, expected, read_bytes
        self.is_causal = is_causal(model)
        self.sums = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]
        trained = {id(p) for p in self.parameters}
        self._layers = [m for m in model.modules() if any(id(p) in trained for p in m.parameters(recurse=False))]
        self._hooks = _import_hooks()(model, strict=False, loss_reduction="sum")

    def add(self, compute_loss: ComputeLoss, inputs: Inputs) -> torch.Tensor:
        """Add a batch's records to the step's sum, and return the batch's loss."""
        loss, gradients = self.take(compute_loss, inputs)
        for total, part in zip(self.sums, clip_records(gradients, self.clip), strict=True):
            total += part
        return loss

    def take(self, compute_loss: ComputeLoss, inputs: Inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss of a batch, and each record's gradient of its own loss, `(records, …)` for each parameter.

        Raises:
            ValueError: if some layer does not see the records one by one.
        """
        counts = count_labels(inputs, self.is_causal)
        device = self.parameters[0].device
        nothing = [torch.zeros(len(counts), *p.shape, device=device) for p in self.parameters]
        if not counts.sum():
            return torch.zeros((), device=device), nothing
        with torch.enable_grad(), warnings.catch_warnings():
            # The first layers have inputs without gradients, of which torch warns.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            loss = compute_loss(dict(inputs))
            loss.backward()
        weights = torch.where(counts > 0, counts.sum() / counts.clamp(min=1), 0.0).to(device)
        found = []
        parameters: list[Any] = self.parameters  # to which Opacus adds an attribute
        for parameter, zeros in zip(parameters, nothing, strict=True):
            sample, whole = parameter.grad_sample, parameter.grad
            parameter.grad_sample = parameter.grad = None
            if sample is None and whole is None:  # a layer that this batch does not use
                found.append(zeros)
                continue
            if not isinstance(sample, torch.Tensor) or len(sample) != len(counts):
                got = "none" if sample is None else f"{len(sample)}"
                raise ValueError(
                    f"A layer of the shape {tuple(parameter.shape)} gives {got} gradients for {len(counts)} rows: it does not "
                    "see rows one by one (experts, joined pairs, or images cut to patches), so no row's part can be bounded. "
                    "Leave it out of target_modules."
                )
            found.append(sample.float() * weights.view(-1, *[1] * parameter.dim()))
        return loss.detach(), found

    @torch.no_grad()
    def finish(self) -> None:
        """Put (Σ clipped gradients + noise) / expected into the parameters' gradients, and begin the next step."""
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            noise = torch.from_numpy(draw_gaussian(total.numel(), self.read_bytes)).view(total.shape)
            noisy = total.double() + noise.to(total.device) * (self.noise_multiplier * self.clip)
            parameter.grad = (noisy / self.expected).to(parameter.dtype)
            total.zero_()

    def verify(self, compute_loss: ComputeLoss, inputs: Inputs, tolerance: float) -> None:
        """Check on some rows, without dropout, that each row's gradient in a batch is the one that it has alone.

        Raises:
            ValueError: if it is another one: the rows of a batch change each other's.
        """
        count = len(count_labels(inputs, self.is_causal))
        with self._without_dropout():
            _, together = self.take(compute_loss, inputs)
            for row in range(count if count > 1 else 0):
                alone = self.take(compute_loss, {key: value[row : row + 1] for key, value in inputs.items()})[1]
                wanted = torch.cat([part.flatten() for part in alone])
                found = torch.cat([part[row].flatten() for part in together])
                if not (found - wanted).norm() <= tolerance * wanted.norm():
                    raise ValueError(
                        f"A row's gradient differs by {float((found - wanted).norm() / wanted.norm()):.1%} between a batch and "
                        "the row alone. In this model or loss the rows of a batch change each other, so no row's part can be "
                        "bounded: record-level differential privacy can't be had."
                    )

    def close(self) -> None:
        """Take all hooks and gradients off the model, and what a run that raised left between them."""
        self._hooks.cleanup()
        for layer in self._layers:
            for name in ("activations", "max_batch_len"):
                vars(layer).pop(name, None)
        for parameter in self.parameters:
            parameter.grad = None

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        for layer in self._layers:
            layer.training = True  # Opacus' hooks take nothing from a layer that does not train
        try:
            yield
        finally:
            for module, was in training.items():
                module.training = was


def clip_records(gradients: Sequence[torch.Tensor], clip: float) -> list[torch.Tensor]:
    """Sums over records of gradients `(records, …)`, each record's scaled down to the norm `clip` over all parameters together.

    A record whose gradient is not finite adds nothing.
    """
    squares = torch.stack([part.double().flatten(1).square().sum(1) for part in gradients]).sum(0)
    finite = torch.isfinite(squares)
    factors = torch.where(finite, (clip / squares.sqrt().clamp(min=1e-300)).clamp(max=1.0), 0.0)
    kept = [torch.where(finite.view(-1, *[1] * (part.dim() - 1)), part, 0.0) for part in gradients]
    return [torch.tensordot(factors.to(part.dtype), part, dims=1) for part in kept]


def count_labels(inputs: Inputs, causal: bool) -> torch.Tensor:
    """Labels that each row of a batch is trained on, `(rows,)`; a causal model predicts none for its first token.

    Raises:
        ValueError: without labels, or where some tensor has not one entry for each row.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or not labels.dim():
        raise ValueError(
            "Record-level differential privacy needs rows with `labels`, over which the loss is a mean: a language model's or a "
            f"classifier's. These rows have {', '.join(inputs)}."
        )
    if wrong := [key for key, value in inputs.items() if getattr(value, "shape", (0,))[:1] != labels.shape[:1]]:
        raise ValueError(f"`{wrong[0]}` of a batch has not one entry for each of its {len(labels)} rows.")
    if labels.is_floating_point():
        return torch.ones(len(labels))
    kept = labels[:, 1:] if causal and labels.dim() > 1 else labels
    return (kept != _IGNORED).reshape(len(labels), -1).sum(1).float().cpu()


def is_causal(model: torch.nn.Module) -> bool:
    """Whether a model's labels are shifted by one token in its loss."""
    return type(find_peft_model(model).get_base_model()).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def check_record_model(model: torch.nn.Module) -> None:
    """Refuse a model of which gradients of single records can't be had.

    Raises:
        ValueError: naming the layer and why.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            reason = "normalizes over the rows of a batch"
        elif type(module).__name__ == "Linear8bitLt":
            reason = "chooses outliers over the rows of a batch: use a base of 4 bits or fewer"
        elif type(module) is not torch.nn.Linear and any(p.requires_grad for p in module.parameters(recurse=False)):
            reason = "is trained and no plain linear layer: leave it out of target_modules or modules_to_save"
        else:
            continue
        raise ValueError(f"Record-level differential privacy: `{name}` ({type(module).__name__}) {reason}.")
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise ValueError(
            "Record-level differential privacy: output_router_logits=True adds a loss over all rows of a batch."
        )


def _import_hooks() -> Any:
    try:
        from opacus.grad_sample.grad_sample_module import GradSampleHooks
    except ImportError:
        raise ValueError(f"DP-SGD needs Opacus: {install_command('privacy')}") from None
    return GradSampleHooks
