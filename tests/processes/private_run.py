# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation whose clients' process writes down every file it opens and every tensor it holds.

`python -m tests.processes.private_run FULL_MODEL OUTPUT_DIR`, run by test_owner.py.
"""

import gc
import json
import os
import sys
import threading
import time
from pathlib import Path


OPENED: set[str] = set()


def watch_files() -> None:
    """Note what this process opens: through Python, through safetensors' own reader, and by what the kernel has mapped."""
    import safetensors
    import safetensors.torch

    sys.addaudithook(lambda event, values: OPENED.add(str(values[0])) if event == "open" else None)
    reader = safetensors.safe_open

    def traced(filename, *args, **kwargs):
        OPENED.add(str(filename))
        return reader(filename, *args, **kwargs)

    safetensors.safe_open = safetensors.torch.safe_open = traced

    def poll() -> None:
        while True:
            for line in Path("/proc/self/maps").read_text().splitlines():
                if (place := line.find("/")) >= 0:
                    OPENED.add(line[place:])
            for descriptor in os.listdir("/proc/self/fd"):
                try:
                    OPENED.add(os.readlink(f"/proc/self/fd/{descriptor}"))
                except OSError:
                    continue
            time.sleep(0.01)

    threading.Thread(target=poll, daemon=True).start()


if __name__ == "__main__":
    watch_files()  # before anything imports the readers by name

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from fedlpp_hf import FederatedConfig, FederatedTrainer
from tests.helpers import make_rows


def main(full_model: str, output_dir: str) -> None:
    rows = make_rows()
    args = FederatedConfig(
        output_dir,
        num_rounds=1,
        partition="client",
        max_steps=1,
        use_cpu=True,
        hub_token="hf_secret_token",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = FederatedTrainer(full_model, args, train_dataset=rows, eval_dataset=rows, peft_config=lora)
    trainer.train()
    held = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    held += [p.data for p in trainer.model.parameters()] + list(trainer.model.buffers())
    tensors = {
        str(number): tensor.detach().float().contiguous().clone()
        for number, tensor in enumerate(held)
        if tensor.is_floating_point() and tensor.dim() >= 2 and not tensor.is_meta  # shapes are no weights
    }
    save_file(tensors, Path(output_dir) / "held.safetensors")
    (Path(output_dir) / "opened.json").write_text(json.dumps(sorted(OPENED)))


if __name__ == "__main__":
    main(*sys.argv[1:])
