# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A small dataset for speech_recognition.py: a synthesizer says numbers with several accents; nothing is downloaded.

    apt install espeak-ng
    python recipes/data/spoken_numbers.py out/numbers

writes `train.jsonl`, `test.jsonl` and `owner.jsonl` with `audio` (the path of a WAV file), `text` and `voice`, the natural client.
"""

import argparse
import json
import random
import shutil
import subprocess
from pathlib import Path


VOICES = ("en-us", "en-gb-scotland", "en-029")  # America, Scotland, the Caribbean
ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SPLITS = {"owner": 0.1, "test": 0.2, "train": 0.7}


def spell(number: int) -> str:
    """A number below 100 in words."""
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        raise SystemExit("espeak-ng is not installed: apt install espeak-ng")

    draw = random.Random(args.seed)
    (args.output_dir / "sounds").mkdir(parents=True, exist_ok=True)
    rows = []
    for row in range(args.rows):
        text, voice = f"{spell(draw.randrange(100))} and {spell(draw.randrange(100))}", VOICES[row % len(VOICES)]
        path = args.output_dir / "sounds" / f"{row:04}.wav"
        speed, pitch = str(draw.randrange(140, 200)), str(draw.randrange(30, 70))
        subprocess.run(["espeak-ng", "-v", voice, "-s", speed, "-p", pitch, "-w", str(path), text], check=True)
        rows.append({"audio": f"sounds/{path.name}", "text": text, "voice": voice})
    end = 0.0
    for split, share in SPLITS.items():
        start, end = end, end + share
        part = rows[round(start * len(rows)) : round(end * len(rows))]
        (args.output_dir / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"{args.output_dir}/{split}.jsonl: {len(part)} rows")


if __name__ == "__main__":
    main()
