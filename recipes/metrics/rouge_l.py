# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""ROUGE-L as an `evaluate` metric that needs no Hub."""

import datasets
import evaluate


class RougeL(evaluate.Metric):
    """`rouge_l`: mean F1 of the longest common subsequence of words (Lin 2004, §3), without stemming."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean F1 of the longest common subsequence of words.",
            citation="",
            inputs_description="predictions and references: texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        scores = []
        for prediction, reference in zip(predictions, references, strict=True):
            said, wanted = prediction.lower().split(), reference.lower().split()
            common = [0] * (len(wanted) + 1)  # of the words so far, and the first words of the reference
            for word in said:
                row = [0]
                for place, other in enumerate(wanted):
                    row.append(common[place] + 1 if word == other else max(row[place], common[place + 1]))
                common = row
            scores.append(2 * common[-1] / max(1, len(said) + len(wanted)))
        return {"rouge_l": sum(scores) / max(1, len(scores))}
