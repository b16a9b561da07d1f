# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Which metric is shown, and which way it is better."""

from types import SimpleNamespace

import pytest

from fedlpp_hf.config.federated import FederatedConfig
from fedlpp_hf.config.metrics import MetricChoice, is_result, lower_is_better


LOWER = [
    "eval_loss", "eval_test_loss", "loss", "eval_perplexity", "eval_ppl", "eval_mse", "eval_mae", "eval_rmse", "eval_wer",
    "eval_cer", "eval_ter", "eval_entropy", "eval_nll", "eval_mean_squared_error", "eval_word_error_rate",
    "eval_error_rate", "eval_error", "eval_rmse_mean", "eval_loss_all", "eval_nmse", "eval_logloss", "eval_cross_entropy",
    "eval_brier_score", "eval_dev_mean_absolute_error", "eval_ece", "eval_perplexity_per_word", "eval_top_5_error",
    "eval_wer_ortho", "eval_negative_log_likelihood", "eval_false_positive_rate", "eval_edit_distance", "eval_MSE",
    "eval_negative_loss", "eval_mse_validation", "eval_l2_error",
]  # fmt: skip
GREATER = [
    "eval_accuracy", "eval_f1", "eval_bleu", "eval_rougeL", "eval_loss_data_accuracy", "eval_answer", "eval_power",
    "eval_error_free", "accuracy", "eval_r2", "eval_negative_mse", "eval_neg_mean_squared_error", "eval_log_likelihood",
    "eval_true_negative_rate", "eval_mean_token_accuracy", "eval_reward", "eval_matthews_correlation",
    "eval_sts-dev_spearman_cosine", "eval_rewards/accuracies", "eval_ndcg@10", "eval_lossless", "eval_auc",
]  # fmt: skip


@pytest.mark.parametrize("name", LOWER)
def test_losses_and_errors_are_better_when_small(name):
    assert lower_is_better(name)
    assert MetricChoice().is_better(name, 1.0, 2.0) and not MetricChoice().is_better(name, 1.0, 1.0)


@pytest.mark.parametrize("name", GREATER)
def test_all_else_is_better_when_large(name):
    assert not lower_is_better(name)
    assert MetricChoice().is_better(name, 2.0, 1.0) and not MetricChoice().is_better(name, 1.0, 1.0)


def test_what_the_user_says_comes_first():
    choice = MetricChoice("toughness", False)
    assert choice.is_better("eval_toughness", 1.0, 2.0) and choice.is_better("eval_accuracy", 2.0, 1.0)
    assert MetricChoice(None, False).is_better("eval_accuracy", 1.0, 2.0)
    assert MetricChoice("eval_mse", True).is_better("eval_mse", 2.0, 1.0)


@pytest.mark.parametrize(
    "metrics, shown",
    [
        ("eval_loss eval_accuracy eval_f1", "eval_accuracy"),
        ("eval_loss", "eval_loss"),
        ("", None),
        ("eval_num_tokens", "eval_num_tokens"),  # better than nothing
        # SFT, DPO, KTO, reward and GRPO trainers of TRL.
        ("eval_loss eval_entropy eval_num_tokens eval_mean_token_accuracy", "eval_mean_token_accuracy"),
        ("eval_loss eval_rewards/chosen eval_rewards/rejected eval_rewards/accuracies eval_logps/chosen", "eval_rewards/accuracies"),
        ("eval_loss eval_rewards/chosen eval_logps/chosen eval_logits/chosen eval_rewards/margins", "eval_loss"),
        ("eval_loss eval_num_tokens eval_min_reward eval_mean_reward eval_max_reward eval_accuracy eval_margin", "eval_accuracy"),
        ("eval_loss eval_completions/mean_length eval_reward eval_reward_std eval_frac_reward_zero_std", "eval_reward"),
        # Summarization and translation.
        ("eval_loss eval_gen_len eval_rouge1", "eval_rouge1"),
        ("eval_loss eval_sys_len eval_bp eval_score", "eval_score"),
        ("eval_aux_loss eval_loss", "eval_loss"),
        ("eval_a_loss eval_a_accuracy eval_b_loss eval_b_accuracy", "eval_a_accuracy"),
        ("eval_loss eval_samples_per_second eval_model_preparation_time", "eval_loss"),
    ],
)  # fmt: skip
def test_headline_is_a_result(metrics, shown):
    values = dict.fromkeys(metrics.split(), 0.5)
    assert MetricChoice().main(values) == shown
    assert MetricChoice("b_loss").main(values) == ("eval_b_loss" if "eval_b_loss" in values else shown)


def test_headline_is_a_number():
    metrics = {
        "eval_per_class": {"0": 1.0},
        "eval_note": "text",
        "eval_flag": True,
        "eval_none": None,
        "eval_loss": 1.0,
    }
    assert MetricChoice().main(metrics) == "eval_loss"
    assert MetricChoice("note").main(metrics) == "eval_loss"


def test_entropy_of_answers_is_no_result():
    assert not is_result("eval_entropy") and is_result("eval_cross_entropy")


def test_choice_is_read_from_arguments_or_their_values():
    values = {"metric_for_best_model": "mse", "greater_is_better": False}
    assert MetricChoice.of(values) == MetricChoice.of(SimpleNamespace(**values)) == MetricChoice("mse", False)
    assert MetricChoice.of({}) == MetricChoice()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, (None, None, False)),
        ({"load_best_model_at_end": True}, ("loss", False, True)),
        ({"load_best_model_at_end": True, "metric_for_best_model": "mse"}, ("mse", False, True)),
        ({"metric_for_best_model": "wer"}, ("wer", False, False)),
        ({"metric_for_best_model": "f1"}, ("f1", True, False)),
        ({"metric_for_best_model": "mse", "greater_is_better": True}, ("mse", True, False)),
    ],
    ids=str,
)
def test_options_of_the_best_round(options, expected, tmp_path):
    args = FederatedConfig(str(tmp_path), use_cpu=True, **options)
    assert (args.metric_for_best_model, args.greater_is_better, args.load_best_model_at_end) == expected
    assert args.save_strategy == "no"
