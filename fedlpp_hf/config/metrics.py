# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which metric of an evaluation counts, and which way it is better."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


# Last words of metrics that are better when small.
_LOWER = {
    "loss", "perplexity", "ppl", "error", "errors", "err", "mse", "mae", "mape", "smape", "mase", "rmse", "rmsle", "msle",
    "nmse", "nrmse", "wer", "cer", "ter", "mer", "per", "eer", "fpr", "fnr", "entropy", "nll", "bpb", "bpc", "fid", "kid",
    "brier", "ece", "mce", "crps", "divergence", "kl", "distance", "deviation", "regret", "latency", "cost", "toxicity",
}  # fmt: skip
_LOWER_ENDINGS = ("loss", "perplexity", "error", "entropy", "mse", "mae")
# Words behind the metric's own name.
_BEHIND = {
    "rate", "mean", "avg", "average", "macro", "micro", "weighted", "score", "value", "total", "sum", "norm", "normalized",
    "overall", "all", "at", "val", "valid", "validation", "test", "dev", "ortho",
}  # fmt: skip
# Last words of what trainers and metrics report beside their results: counts, timings, properties of the answers.
_NO_RESULT = {
    "tokens", "runtime", "second", "epoch", "step", "steps", "time", "memory", "length", "lengths", "len", "margin",
    "margins", "ratio", "penalty", "bp", "counts", "totals", "chosen", "rejected", "clipped", "threshold", "std", "min",
    "max", "rank", "flos",
}  # fmt: skip
_NO_RESULT_ANYWHERE = {"min", "max", "std", "logps", "logits", "odds", "mem", "num"}


@dataclass(frozen=True, slots=True)
class MetricChoice:
    """Which metric counts: `metric_for_best_model` and `greater_is_better` of the training arguments; None: by their names.

    Args:
        name: The metric, with or without `eval_`.
        greater_is_better: Which way it is better.
    """

    name: str | None = None
    greater_is_better: bool | None = None

    @classmethod
    def of(cls, options: Any) -> "MetricChoice":
        """The choice that `options` make: training arguments, or a mapping of their values."""
        read = options.get if isinstance(options, Mapping) else lambda name: getattr(options, name, None)
        return cls(read("metric_for_best_model"), read("greater_is_better"))

    @property
    def key(self) -> str | None:
        """The chosen metric as a Trainer calls it."""
        return self.name if self.name is None or self.name.startswith("eval_") else f"eval_{self.name}"

    def main(self, metrics: Mapping[str, Any]) -> str | None:
        """The metric to show: the chosen one, else the first that is a result and no loss, else the loss."""
        names = [name for name, value in metrics.items() if is_number(value)]
        if self.key in names:
            return self.key
        beside = _list_beside(names)
        results = [name for name in names if is_result(name) and name not in beside]
        losses = sorted((name for name in results if name.endswith("loss")), key=lambda name: name != "eval_loss")
        return next((name for name in results if not name.endswith("loss")), None) or next(iter(losses or names), None)

    def is_better(self, name: str, value: float, other: float) -> bool:
        """Whether `value` of a metric is better than `other`."""
        chosen = self.greater_is_better is not None and (self.name is None or self.key == name)
        greater = self.greater_is_better if chosen else not lower_is_better(name)
        return value > other if greater else value < other


def is_number(value: Any) -> bool:
    """Whether a metric's value is a number that can be printed as one."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000
    )


def is_result(name: str) -> bool:
    """Whether a metric says how good a model is; counts of tokens, timings and the like do not."""
    words = _split(name)
    if words[-2:] == ["mean", "reward"] or (words[-1] == "entropy" and "cross" not in words):
        return False
    return words[-1] not in _NO_RESULT and not _NO_RESULT_ANYWHERE.intersection(words)


def lower_is_better(name: str) -> bool:
    """Whether a metric is better when it is small, by the last part of its name: losses, errors, perplexities, `wer`, ….

    `neg_…` and `negative_…` turn it around, as scikit-learn and Sentence Transformers name what they maximise.
    """
    words = _split(name)
    if "per" in words[1:-1]:
        words = words[: words.index("per", 1)]
    if "false" in words and {"positive", "negative", "positives", "negatives"}.intersection(words):
        return True
    while len(words) > 1 and (words[-1] in _BEHIND or re.fullmatch(r"[lk]?\d+|k", words[-1])):
        words = words[:-1]
    last, before = words[-1], words[:-1]
    lower = last in _LOWER or last.endswith(_LOWER_ENDINGS)
    turned = "neg" in before or ("negative" in before and last != "loss")
    if last in ("likelihood", "loglikelihood"):
        return turned
    return lower and not turned


def _list_beside(names: list[str]) -> set[str]:
    """What TRL's trainers of preferences and rewards measure beside their result."""
    beside = set()
    if "eval_rewards/accuracies" in names:
        beside |= {"eval_mean_token_accuracy"}
    if "eval_reward" in names:
        beside |= {name for name in names if name.startswith("eval_rewards/")}
    if any(name.startswith("eval_reward") for name in names):
        beside |= {"eval_kl"}
    return beside


def _split(name: str) -> list[str]:
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    return (words[1:] if words[:1] == ["eval"] and len(words) > 1 else words) or [""]
