# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The Auto class of each task that an adapter's configuration names."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from peft import PeftConfig

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def find_auto_class(peft_config: "PeftConfig | Mapping[str, Any]") -> str | None:
    """The name of the Auto class for an adapter's task; None where its configuration names none."""
    values = peft_config if isinstance(peft_config, Mapping) else vars(peft_config)
    task = values.get("task_type")
    return _AUTO_CLASSES.get(str(getattr(task, "value", task)))
