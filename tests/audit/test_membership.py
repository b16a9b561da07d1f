# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Membership: chance where rows were not trained on, and certain where a model knows them by heart."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn

from fedlpp_hf.audit.membership import compare_scores, measure_auc, measure_tpr, score_loss, score_ratio


def test_figures_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    members, others = generator.normal(0.7, 1, 300).round(1), generator.normal(0, 1, 400).round(1)  # with ties
    labels, scores = np.r_[np.ones(300), np.zeros(400)], np.r_[members, others]
    assert measure_auc(members, others) == pytest.approx(roc_auc_score(labels, scores))
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert measure_tpr(members, others) == pytest.approx(true[false <= 0.01].max())


def test_equal_distributions_are_chance():
    generator = np.random.default_rng(0)
    found = compare_scores("loss threshold", generator.normal(size=300), generator.normal(size=300))
    assert found.auc_low < 0.5 < found.auc_high and found.auc_high - found.auc_low < 0.15 and found.tpr < 0.06


def test_an_overfitted_model_gives_its_rows_away():
    """Labels are chance: what the model knows of its rows it has learned by heart. The ratio's reference is an untrained model, which adds noise."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(200, 20), torch.randint(4, (200,))
    model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 4))

    def losses():
        with torch.no_grad():
            return nn.functional.cross_entropy(model(inputs), labels, reduction="none").numpy()

    before = losses()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[:100]), labels[:100]).backward()
        optimizer.step()
    after = losses()
    for score in (score_loss, score_ratio):
        scores = score(before, after)
        found = compare_scores("", scores[:100], scores[100:])
        assert found.auc > 0.85 and found.auc_low > 0.8 and found.tpr > 0.03
        untouched = score(before, before)
        assert 0.35 < measure_auc(untouched[:100], untouched[100:]) < 0.65


def test_few_others_allow_no_false_alarm():
    assert measure_tpr(np.array([3.0, 1.0]), np.array([2.0, 0.0])) == 0.5
    with pytest.raises(ValueError, match="1 of 2 members"):
        compare_scores("", np.array([1.0, np.nan]), np.array([1.0]))
