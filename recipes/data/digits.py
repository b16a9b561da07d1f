# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A small real dataset for image_classification.py: the handwritten digits that scikit-learn carries; nothing is downloaded.

    python recipes/data/digits.py out/digits

writes PNG files of 8 × 8 pixels (1,797 of them, UCI's test set of optical digits, CC BY 4.0) into `train/<digit>`, `test/<digit>`
and `validation/<digit>`. The last is the owner's.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


SPLITS = {"validation": 0.1, "test": 0.2, "train": 0.7}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    digits = load_digits()
    order = np.random.default_rng(args.seed).permutation(len(digits.target))
    end = 0.0
    for split, share in SPLITS.items():
        start, end = end, end + share
        numbers = order[round(start * len(order)) : round(end * len(order))]
        for number in numbers:
            folder = args.output_dir / split / str(digits.target[number])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.round(digits.images[number] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:04}.png")
        print(f"{args.output_dir}/{split}: {len(numbers)} images")


if __name__ == "__main__":
    main()
