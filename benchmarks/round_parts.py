# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Where a client's round and a bare loop spend what is not the model's own work, in milliseconds of the processor.

    python -m benchmarks.round_parts [--steps 20] [--seconds 10]

The round, the model and the loop of benchmarks.round_overhead, on one thread, but the model's forward is a sum over the
adapter: what is around it would drown in the noise of a real one. A timer of processor time interrupts the work, and each
interruption counts for the innermost function on the stack that has its own part.
"""

import argparse
import gc
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.round_overhead import make_trainer, run_bare_loop
from fedlpp_hf import FederatedTrainer
from fedlpp_hf.tensors.adapters import copy_adapter, load_adapter_
from fedlpp_hf.wire.messages import ClientTask


# Functions, or functions of one module, by part.
PARTS = {
    "seeds": ["set_seed"],
    "the guard: task, proxy, Δ, base unmoved": [
        "guard.accept",
        "guard.on_train_begin",
        "guard.on_train_end",
    ],
    "setting the mode": ["module.train"],
    "a dataloader": ["get_train_dataloader", "dataloader.__init__"],
    "an optimizer and a schedule": ["create_optimizer", "create_scheduler", "get_scheduler", "adamw.__init__"],
    "wrapping model and optimizer": ["_prepare_for_training"],
    "batches: rows, collation": ["get_batch_samples", "dataloader.__next__", "dataloader.__iter__"],
    "the sum: forward, loss, backward": ["training_step", "forward", "backward"],
    "clipping": ["_clip_grad_norm", "clip_grad_norm_"],
    "the optimizer's step": ["optimizer.step", "adam.step", "lr_scheduler.wrapper"],
    "the schedule's step": ["lr_scheduler.step"],
    "clearing gradients": ["zero_grad"],
    "events of callbacks": ["call_event"],
    "metrics and log at the end": ["_finalize_training"],
}
PART_OF = {function: part for part, functions in PARTS.items() for function in functions}
REST = "all else"


def find_part(frame: FrameType | None) -> str:
    """The part of the innermost function that has one."""
    while frame is not None:
        name, module = frame.f_code.co_name, Path(frame.f_code.co_filename).stem
        part = PART_OF.get(f"{module}.{name}") or PART_OF.get(name)
        if part:
            return part
        frame = frame.f_back
    return REST


def sample(work: Callable[[], None], seconds: float) -> dict[str, float]:
    """Milliseconds of the processor that one `work` takes, by part, from as many as fit into `seconds`."""
    found: Counter[str] = Counter()
    signal.signal(signal.SIGPROF, lambda _, frame: found.update([find_part(frame)]))
    work()
    found.clear()
    began, count = time.process_time(), 0
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    while time.process_time() - began < seconds:
        work()
        count += 1
    signal.setitimer(signal.ITIMER_PROF, 0)
    each = 1000 * (time.process_time() - began) / count
    return {part: each * samples / found.total() for part, samples in found.items()} | {"in all": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10, help="of the processor, for each column")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| milliseconds of the processor | round of 1 step | bare loop | round of", end=" ")
    print(f"{options.steps} steps | bare loop |\n|---|---|---|---|---|")
    columns = []
    for steps in (1, options.steps):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(Path(folder), steps)
        adapter = list(trainer.guard.parameters.values())
        start = copy_adapter(trainer.guard.parameters)
        task = ClientTask("benchmark", 1, 1, "client", 7, trainer.guard.fingerprint, start)

        def forward(*_: object, adapter: list[torch.Tensor] = adapter, **__: object) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(loss=torch.stack([tensor.sum() for tensor in adapter]).sum())

        trainer.model.forward = forward
        gc.collect()
        gc.freeze()

        def run_round(trainer: FederatedTrainer = trainer, task: ClientTask = task) -> None:
            trainer.train_client(task)

        def run_loop(trainer: FederatedTrainer = trainer, task: ClientTask = task, steps: int = steps) -> None:
            load_adapter_(trainer.guard.parameters, task.proxy_tensors())
            run_bare_loop(trainer, task, steps)

        columns += [sample(run_round, options.seconds), sample(run_loop, options.seconds)]
        gc.unfreeze()
    for part in [*PARTS, REST, "in all"]:
        print(f"| {part} | " + " | ".join(f"{column.get(part, 0.0):.1f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
