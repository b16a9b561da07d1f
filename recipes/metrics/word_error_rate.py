# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Word error rate as an `evaluate` metric that needs no Hub."""

import datasets
import evaluate


class WordErrorRate(evaluate.Metric):
    """`wer`: words to insert, delete or replace in all predictions, over the words of all references."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Word error rate: 0 is best; it may exceed 1.",
            citation="",
            inputs_description="predictions and references: texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        edits = words = 0
        for prediction, reference in zip(predictions, references, strict=True):
            said, wanted = prediction.lower().split(), reference.lower().split()
            distance = list(range(len(wanted) + 1))  # from the words so far to the first words of the reference
            for number, word in enumerate(said, start=1):
                row = [number]
                for place, other in enumerate(wanted):
                    row.append(min(row[place] + 1, distance[place + 1] + 1, distance[place] + (word != other)))
                distance = row
            edits += distance[-1]
            words += len(wanted)
        return {"wer": edits / max(1, words)}
