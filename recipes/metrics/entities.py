# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""F1 of entities as an `evaluate` metric that needs no Hub."""

import datasets
import evaluate


class Entities(evaluate.Metric):
    """`f1`, `precision` and `recall` of whole entities, tagged as `B-…`, `I-…` and `O`, and the `accuracy` of tags.

    An entity counts if its kind, its first and its last word are right (CoNLL 2003). An `I-` that continues nothing begins one.
    """

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="F1, precision and recall of entities.",
            citation="",
            inputs_description="predictions and references: a list of tags for each text",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        found = {(row, *entity) for row, tags in enumerate(predictions) for entity in list_entities(tags)}
        wanted = {(row, *entity) for row, tags in enumerate(references) for entity in list_entities(tags)}
        same = [
            one == two
            for said, true in zip(predictions, references, strict=True)
            for one, two in zip(said, true, strict=True)
        ]
        right = len(found & wanted)
        return {
            "f1": 2 * right / max(1, len(found) + len(wanted)),
            "precision": right / max(1, len(found)),
            "recall": right / max(1, len(wanted)),
            "accuracy": sum(same) / max(1, len(same)),
        }


def list_entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """The entities of a text as (kind, first word, word after the last)."""
    entities: list[tuple[str, int, int]] = []
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and (prefix != "I" or name != kind):
            entities.append((kind, start, place))
            kind = ""
        if prefix in ("B", "I") and not kind:
            kind, start = name, place
    return entities
