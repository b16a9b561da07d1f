# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The ranks of one launch, which train each client together: rank 0 leads, and the others do the same runs.

What they tell each other travels as tensors: torch's own way for objects would unpickle them.
"""

import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments

from ..tensors.adapters import load_adapter_
from ..wire.encoding import decode_message, restore_tensors
from ..wire.messages import ClientTask


_Parent: Any = Trainer if TYPE_CHECKING else object
# Where launchers say how many processes they start.
_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")

# Kept, so that gloo's thread never frees them: it needs the interpreter's lock for that, and waits for ever if the process group
# is just being destroyed under the lock, as at the end of a script, where the last thing that ranks do is to hear "stop".
_last_works: deque[Any] = deque(maxlen=2)


class RanksMixin(_Parent):
    """The part of [`FederatedMixin`] that keeps the ranks of a launch together."""

    guard: Any

    def share(self, command: str, make_data: Callable[[], bytes] = bytes) -> None:
        """Tell the other ranks to do the same; does nothing where there are none, and makes no data."""
        if self.args.world_size > 1:
            broadcast_bytes(command.ljust(8).encode() + make_data(), self.args.device)

    def follow(self) -> None:
        """What ranks other than 0 do: the same runs and evaluations as rank 0, which alone speaks to the server."""
        while True:
            data = broadcast_bytes(None, self.args.device)
            command, data = data[:8].decode().strip(), data[8:]
            if command == "train":
                self.train_client(ClientTask.from_bytes(data))
            elif command == "evaluate":
                self.evaluate_proxy(restore_tensors(decode_message("adapter", data)[1]))
            elif command == "hold":
                load_adapter_(self.guard.parameters, restore_tensors(decode_message("adapter", data)[1]))
            else:
                return


def check_launch(args: TrainingArguments) -> None:
    """Refuse a launch in which each process would run a federation by itself, all of them in one directory.

    Raises:
        ValueError: naming both numbers of processes.
    """
    for variable in _WORLD_SIZES:
        launched = os.environ.get(variable, "")
        if launched.isdecimal() and int(launched) > args.world_size:
            raise ValueError(
                f"{launched} processes were launched ({variable}), but this Trainer's world has {args.world_size}: each process "
                "would run the whole federation, in the same output_dir. Launch one process; or several that the Trainer knows "
                "of, with `torchrun --nproc_per_node N` (and use_cpu=True where there is no GPU)."
            )


def broadcast_bytes(data: bytes | None, device: torch.device) -> bytes:
    """Bytes from rank 0, which passes them, to all other ranks, which pass None."""
    size = torch.tensor([0 if data is None else len(data)], device=device)
    _broadcast(size)
    if data is None:
        buffer = torch.empty(int(size), dtype=torch.uint8, device=device)
    else:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    _broadcast(buffer)
    return buffer.cpu().numpy().tobytes()


def _broadcast(tensor: torch.Tensor) -> None:
    work = torch.distributed.broadcast(tensor, 0, async_op=True)
    work.wait()
    _last_works.append(work)
