# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Ways to divide a model among processes, none of which a client's run knows: refused before anything is loaded."""

import os
from typing import Any


# By the variable with which `accelerate launch` tells its workers of them. Each is on when it says so.
_LAUNCHED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_ARGUMENTS = {"fsdp": "FSDP", "deepspeed": "DeepSpeed", "parallelism_config": "a parallelism_config"}
_TRUE = ("true", "1", "yes", "y", "on", "t")  # as accelerate reads it


def check_sharding(args: Any) -> None:
    """Refuse to divide the model among processes.

    A client's run compares its base with the task's by fingerprint, loads the proxy in place, takes the update, and proves the
    base unmoved, all on whole tensors, and FSDP of 4-bit weights would also need them in another storage than the base's.

    Args:
        args: With the fields of [`~transformers.TrainingArguments`].

    Raises:
        ValueError: naming the argument or the variable, and what works.
    """
    given = [
        (what, f"{name}={value!r:.60}") for name, what in _ARGUMENTS.items() if (value := getattr(args, name, None))
    ]
    given += [
        (what, f"{name}={os.environ[name]}, as `accelerate launch` sets it by its configuration")
        for name, what in _LAUNCHED.items()
        if os.environ.get(name, "").lower() in _TRUE
    ]
    for what, how in given:
        raise ValueError(
            f"{what} is on ({how}): it divides the model among processes, and a client's run needs the whole base in each. Leave "
            "it out. `torchrun --nproc_per_node N` trains each client on N GPUs by data parallelism (DDP), and client_workers=N "
            "trains N clients at a time; both keep one copy of the quantized base on each GPU."
        )
