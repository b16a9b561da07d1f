# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Rows come back from a real step of a small model where it is possible, and never from noise."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedlpp_hf.audit.inversion import invert_update
from fedlpp_hf.audit.observed import ObservedUpdate
from fedlpp_hf.audit.recovery import score_recovery, score_tokens
from fedlpp_hf.audit.sequences import InversionLimits
from fedlpp_hf.tensors.adapters import adapter_parameters, copy_adapter, global_norm


TOKENS = 200
SIZES = {
    "vocab_size": TOKENS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make_model(kind: str, rank: int = 32, **changes):
    torch.manual_seed(0)
    if kind == "llama":
        model, names, task = LlamaForCausalLM(LlamaConfig(**SIZES)), ["q_proj", "k_proj", "v_proj"], "CAUSAL_LM"
    else:
        # A last block whose first token is pooled sees averages of its inputs: it takes one more to tell rows apart.
        config = BertConfig(**SIZES | NO_DROPOUT | {"num_hidden_layers": 3} | changes)
        model, names, task = BertForSequenceClassification(config), ["query", "key", "value"], "SEQ_CLS"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names, task_type=task))


def make_rows(count: int, length: int = 10) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(5, TOKENS, (count, length), generator=generator)
    rows[:, 0], rows[:, -1] = 1, 2
    return rows.tolist()


def take_steps(model, rows, optimizer=torch.optim.SGD, rate=0.1, steps=1, limit=1.0) -> ObservedUpdate:
    """What a server sees of a client that trained on all rows at once."""
    parameters = adapter_parameters(model)
    start, ids = copy_adapter(parameters), torch.tensor(rows)
    encoder = isinstance(model.get_base_model(), BertForSequenceClassification)
    labels = ids[:, 1] % 2 if encoder else ids
    chosen = optimizer(parameters.values(), lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        chosen.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), limit)
        chosen.step()
    end = copy_adapter(parameters)
    adam_rate = rate if optimizer is torch.optim.AdamW and steps == 1 else None
    return ObservedUpdate({key: end[key] - start[key] for key in end}, start, adam_rate=adam_rate)


def attack(model, update, rows, **limits):
    known = InversionLimits(len(rows), len(rows[0]), begin_token=1, end_token=2, **{"evaluations": 0} | limits)
    found = invert_update(model, update, model.peft_config["default"], known)
    tokens = score_tokens(rows, {token for place in found.tokens for token in place}, {1, 2})
    return found, tokens, score_recovery(rows, found.rows, {1, 2})


@pytest.mark.parametrize(("kind", "count"), [("llama", 2), ("bert", 1), ("bert", 2)])
def test_one_step_of_sgd_gives_its_rows_away_and_noise_gives_nothing(kind, count):
    model, rows = make_model(kind), make_rows(count)
    update = take_steps(model, rows)
    held = copy_adapter(adapter_parameters(model))
    found, _, scores = attack(model, update, rows)
    assert (scores.exact, scores.rouge_l) == (100, 100) and found.by == ("spans", "spans")
    assert kind == "bert" or found.match == pytest.approx(1, abs=1e-4)
    # The model is as it was.
    after = copy_adapter(adapter_parameters(model))
    assert model.training and all(torch.equal(held[key], after[key]) for key in held)

    generator = torch.Generator().manual_seed(0)
    noise = {key: torch.randn(value.shape, generator=generator) for key, value in update.delta.items()}
    scale = global_norm(update.delta) / global_norm(noise)
    nothing = ObservedUpdate({key: scale * value for key, value in noise.items()}, update.start, noise=scale)
    found, tokens, scores = attack(model, nothing, rows)
    assert (tokens, scores.exact) == (0, 0) and scores.rouge_l < 30


def test_clipping_is_no_defence_and_noise_under_the_update_is():
    model, rows = make_model("bert"), make_rows(1)
    update = take_steps(model, rows)
    clipped = ObservedUpdate({key: 0.01 * value for key, value in update.delta.items()}, update.start)
    assert attack(model, clipped, rows)[2].exact == 100
    std = global_norm(update.delta)  # of a noise multiplier of 1
    generator = torch.Generator().manual_seed(0)
    noisy = {key: v + std * torch.randn(v.shape, generator=generator) for key, v in update.delta.items()}
    assert attack(model, ObservedUpdate(noisy, update.start, noise=std), rows)[2].rouge_l == 0


def test_the_rank_limits_spans_in_the_first_round_and_three_times_the_rank_later():
    """In the first round only dB tells, up to r inputs; later dA of query, key and value tell 3r."""
    rows = make_rows(2)
    model = make_model("llama", rank=8)
    first = take_steps(model, rows)
    assert attack(model, first, rows)[0].by[0] == "nothing"
    later = take_steps(model, rows)
    assert attack(model, later, rows)[1] > 90


def test_one_step_of_adam_is_no_defence_and_several_are():
    rows = make_rows(1)
    model = make_model("bert")
    # Gradients as small as those of one value of a million under the Trainer's limit for their norm.
    assert attack(model, take_steps(model, rows, torch.optim.AdamW, 1e-3, limit=0.02), rows)[2].exact == 100
    model = make_model("bert")
    assert attack(model, take_steps(model, rows, torch.optim.AdamW, 1e-3, steps=4), rows)[2].exact == 0


@pytest.mark.slow
def test_optimization_finds_a_row_where_the_rank_leaves_no_span():
    model, rows = make_model("llama", rank=4), make_rows(1, length=6)
    found, tokens, scores = attack(model, take_steps(model, rows), rows, evaluations=1500)
    assert (tokens, found.by) == (0, ("nothing", "optimization"))
    assert found.match > 0.8 and scores.rouge_1 > 60


def test_dropout_before_the_first_block_hides_its_inputs():
    rows, model = make_rows(1), make_model("bert", hidden_dropout_prob=0.1)
    assert attack(model, take_steps(model, rows), rows)[2].exact == 0


def test_several_steps_of_sgd_still_span_the_first_layer_s_inputs():
    """Its inputs do not depend on the adapter, whatever the steps: tokens are found, the order drifts."""
    rows, model = make_rows(2), make_model("llama", rank=16)
    assert attack(model, take_steps(model, rows, steps=5, rate=0.3), rows)[1] > 90


def test_an_adapter_that_sees_no_token_alone_is_refused():
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM")
    model, rows = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), lora), make_rows(1)
    with pytest.raises(ValueError, match=r"No target layer sees a token alone.*o_proj"):
        attack(model, take_steps(model, rows), rows)
