# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Scripts and notebooks as people write them: no guard, and everything defined where it is used."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT


# Read like a script by the first test, and cell by cell by the second. Class, collator, metric and config are of `__main__`.
SCRIPT = """
import sys, threading
import torch
from dataclasses import dataclass
from datasets import Dataset
from peft import LoraConfig
from transformers import default_data_collator
from fedlpp_hf import FederatedConfig, FederatedTrainer

# %%
SCALE = 2.0

class MyTrainer(FederatedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (SCALE * loss, outputs) if return_outputs else SCALE * loss

@dataclass
class MyConfig(FederatedConfig):
    note: str = "mine"

def collate(rows):
    return default_data_collator(rows)

def measure(prediction):
    return {"scale": SCALE, "rows": len(prediction.label_ids)}

# %%
ids = [[(start + step) % 60 + 2 for step in range(8)] for start in range(12)]
rows = Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * 8] * 12})

def make(**options):
    args = MyConfig(
        sys.argv[2], num_rounds=1, num_clients=2, max_steps=1, per_device_train_batch_size=4, use_cpu=True,
        disable_tqdm=True, merge=False, overwrite=True, **options
    )
    return MyTrainer(
        sys.argv[1], args, train_dataset=rows, eval_dataset=rows, data_collator=collate,
        compute_metrics=options.pop("metric", None) or measure,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )

# %%
trainer = make(client_workers=2)
trainer.train()
metrics = trainer.server.store.records()[-1]["metrics"]
assert metrics["server"]["eval_scale"] == 2.0 and metrics["server"]["eval_rows"] == 12
assert abs(metrics["server"]["eval_loss"] - metrics["proxy"]["eval_loss"]) < 0.5
print("trained", metrics["server"]["eval_loss"])

# %%
lock = threading.Lock()

def measure(prediction):
    with lock:
        return {}

try:
    make()
except ValueError as error:
    print("refused", error)
"""
# What an IPython kernel does: each cell is compiled under a name of no file, and runs in `__main__`.
KERNEL = """
import json, sys
import __main__
for number, cell in enumerate(json.loads(sys.stdin.read())):
    exec(compile(cell, f"<ipython-input-{number}>", "exec"), vars(__main__))
"""


def run(command, full_llama, output_dir, text=None):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command, str(full_llama), str(output_dir)],
        capture_output=True, text=True, check=True, timeout=280, env=environment, input=text,
    ).stdout  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("form", ["script", pytest.param("notebook", marks=pytest.mark.slow)])
def test_no_guard_is_needed(form, full_llama, tmp_path):
    if form == "script":
        (tmp_path / "train.py").write_text(SCRIPT.replace("client_workers=2", "client_workers=1"))
        output = run([str(tmp_path / "train.py")], full_llama, tmp_path / "out")
    else:
        output = run(["-c", KERNEL], full_llama, tmp_path / "out", json.dumps(SCRIPT.split("# %%")))
    lines = output.splitlines()
    assert any(line.startswith("trained ") for line in lines)
    (refusal,) = [line for line in lines if line.startswith("refused ")]
    assert "The owner's process can't be given what it needs" in refusal and "lock" in refusal
