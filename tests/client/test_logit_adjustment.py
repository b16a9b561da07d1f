# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients whose labels differ: the adjusted loss, whose logits it moves and whose it does not, and what is refused."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from fedlpp_hf.client.logit_adjustment import adjust_logits, check_labels, count_labels, find_head, label_distance

from ..helpers import SMALL_MODELS


ROWS = Dataset.from_dict({"label": [0] * 6 + [1] * 3 + [2]})
LOG_PRIOR = torch.log(torch.tensor([7.0, 4.0, 2.0]) / 13)


def make_classifier(name="bert", **config):
    kind, settings = SMALL_MODELS[name]
    torch.manual_seed(0)
    model = kind(type(settings)(**settings.to_dict() | config))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_the_loss_is_that_of_adjusted_logits_in_training_alone(name):
    model, inputs = make_classifier(name), {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 3]])}
    labels = torch.tensor([0, 2])
    plain = model(**inputs, labels=labels)
    hook = adjust_logits(model, ROWS, 2.0)
    assert torch.equal(model.eval()(**inputs).logits, plain.logits)
    found = model.train()(**inputs, labels=labels)
    torch.testing.assert_close(found.logits, plain.logits + 2 * LOG_PRIOR)
    torch.testing.assert_close(found.loss, cross_entropy(plain.logits + 2 * LOG_PRIOR, labels))
    hook.remove()
    assert torch.equal(model(**inputs).logits, plain.logits)


def test_a_balanced_client_trains_as_without():
    model, inputs = make_classifier(), {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([1])}
    plain = model.train()(**inputs).loss
    adjust_logits(model, Dataset.from_dict({"labels": [0, 1, 2] * 5}), 1.0)
    torch.testing.assert_close(model(**inputs).loss, plain)


@pytest.mark.parametrize(
    "rows",
    [
        Dataset.from_dict({"labels": [0, 0, 1, 2, 2, 2]}),
        [{"label": 0}, {"label": 0}, {"label": 1}, {"label": 2}, {"label": 2}, {"label": 2}],
        Dataset.from_dict({"labels": [[0, -100, 0, 1], [2, 2, 2, -100]]}),
        Dataset.from_dict({"labels": [0, 0, 1, 2, 2, 2]}).with_format("torch"),
    ],
)
def test_labels_of_rows_and_of_tokens_are_counted(rows):
    assert count_labels(rows, 4).tolist() == [2, 1, 3, 0]


def test_rows_that_cannot_be_counted_are_refused():
    for rows, reason in (
        (IterableDataset.from_generator(lambda: iter([{"label": 0}])), "a stream's are not known"),
        (Dataset.from_dict({"text": ["a"]}), "no column labels, label, label_ids"),
        ([{"text": "a"}], "no column labels"),
        (Dataset.from_dict({"label": [0, 3]}), "labels run from 0 to 3 as int64; expected classes from 0 to 2"),
        (Dataset.from_dict({"label": [0.5, 1.0]}), "as float64; expected classes"),
    ):
        with pytest.raises(ValueError, match=reason):
            count_labels(rows, 3)
    assert count_labels([], 3).tolist() == [0, 0, 0]


def test_models_without_classes_are_refused():
    for model in (make_classifier(problem_type="multi_label_classification"), make_classifier(num_labels=1)):
        with pytest.raises(ValueError, match=r"needs a classifier .* Set logit_adjustment=0"):
            find_head(model)
    kind, config = SMALL_MODELS["llama"]
    language_model = get_peft_model(kind(config), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="needs a classifier"):
        check_labels(language_model, {"a": ROWS}, 1.0)
    check_labels(language_model, {"a": ROWS}, 0.0)


def test_distance_of_labels():
    assert label_distance([np.array([5, 5]), np.array([50, 50]), np.array([0, 0])]) == 0
    assert math.isclose(label_distance([np.array([5, 0]), np.array([0, 7])]), 0.5)
    assert label_distance([np.array([5, 0])]) == 0


def test_clients_that_differ_are_pointed_out(caplog):
    model = make_classifier()
    check_labels(
        model, {"a": Dataset.from_dict({"label": [0, 1, 2]}), "b": Dataset.from_dict({"label": [2, 1, 0]})}, 0.0
    )
    assert not caplog.messages
    skewed = {"a": Dataset.from_dict({"label": [0, 0]}), "b": Dataset.from_dict({"label": [1, 2]})}
    check_labels(model, skewed, 0.0)
    assert "Try logit_adjustment=1" in caplog.text
    with pytest.raises(ValueError, match="no column"):
        check_labels(model, {"a": Dataset.from_dict({"x": [0]})}, 1.0)
