# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Options of the federation at work in real runs of the trainer: what is sent, what is trained, what is merged."""

import pytest
import torch

from fedlpp_hf import FederatedTrainer, load_base
from fedlpp_hf.tensors.lora import lora_factors
from fedlpp_hf.trainer.publishing import MERGED_DIR
from fedlpp_hf.wire.encoding import restore_tensors
from tests.helpers import make_rows, make_trainer


class Recorder(FederatedTrainer):
    """Keeps tasks and updates, as a test's view of the wire."""

    def train_client(self, task):
        update = super().train_client(task)
        self.__dict__.setdefault("sent", []).append((task, update))
        return update


def run(base, output_dir, lora, **options):
    trainer = make_trainer(load_base(base), output_dir, lora, cls=Recorder, **options)
    trainer.train()
    return trainer


def test_freeze_a_trains_and_sends_b_alone(llama_base, lora, tmp_path):
    trainer = run(llama_base, tmp_path, lora, aggregation="freeze_a")
    for _, update in trainer.sent:
        assert all("lora_B" in key for key in update.delta)
    for key, value in trainer.server.adapter.items():
        held = restore_tensors(trainer.sent[0][0].proxy)[key]
        assert torch.equal(value, held) == ("lora_A" in key)  # the server's A is bit-identical to what clients have


def test_exact_moves_the_product_by_the_clients_mean(llama_base, lora, tmp_path):
    trainer = run(llama_base, tmp_path, lora, aggregation="exact", num_rounds=1, adapter_bits=32, weighting="uniform")
    joined, config = trainer.server.merged_adapter()
    start = trainer.guard.initial
    for target in lora_factors(start, trainer.server.peft_config).values():
        a, b = target.key_a, target.key_b
        products = [
            (start[b] + update.delta[b]).double() @ (start[a] + update.delta[a]).double() for _, update in trainer.sent
        ]
        mean = sum(products) / len(products)
        torch.testing.assert_close(joined[b].double() @ joined[a].double(), mean, rtol=1e-4, atol=1e-7)
    assert all(rank > lora.r for rank in config.rank_pattern.values())
    record = trainer.server.store.records()[1]
    assert 0 < record["residual_norm"] < record["product_norm"]


def test_exact_without_a_broadcast_moves_the_product_too(llama_base, lora, tmp_path):
    """All clients start from the untouched adapter, whose B is zero: the mean product is what they have trained."""
    trainer = run(
        llama_base, tmp_path, lora, aggregation="exact", broadcast="never", num_rounds=1, weighting="uniform"
    )
    assert all(task.proxy is None for task, _ in trainer.sent)
    joined, _ = trainer.server.merged_adapter()
    start = trainer.guard.initial
    for target in lora_factors(start, trainer.server.peft_config).values():
        a, b = target.key_a, target.key_b
        mean = sum(update.delta[b].double() @ (start[a] + update.delta[a]).double() for _, update in trainer.sent) / 3
        assert mean.norm() > 0
        torch.testing.assert_close(joined[b].double() @ joined[a].double(), mean, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_owner_evaluates_and_merges_the_residual_too(full_llama, lora, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = make_rows()
    trainer = make_trainer(str(full_llama), tmp_path, lora, eval_dataset=rows, aggregation="exact", max_steps=4)
    trainer.train()
    batch = rows.remove_columns("client").with_format("torch")[:]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / MERGED_DIR).eval()
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(full_llama), tmp_path).eval()
    with torch.no_grad():
        losses = [float(model(**batch).loss) for model in (merged, served)]
    reported = trainer.server.store.records()[-1]["metrics"]["server"]["eval_loss"]
    assert losses == pytest.approx([reported] * 2, rel=1e-4)
    # What the adapter's own rank holds is another model, so the test would notice a forgotten residual.
    round_dir = trainer.server.store.round_dir(2)
    truncated = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(full_llama), round_dir).eval()
    with torch.no_grad():
        assert abs(float(truncated(**batch).loss) - reported) > 1e-5


def test_compressed_updates_are_small_and_remembered(llama_base, lora, tmp_path):
    plain = run(llama_base, tmp_path / "plain", lora)
    small = run(llama_base, tmp_path / "small", lora, update_bits=2, update_density=0.1)
    up = [trainer.server.store.records()[1]["bytes_up"] for trainer in (plain, small)]
    assert up[1] < up[0] / 2  # headers weigh much in an adapter this small
    memory = list((tmp_path / "small" / "_clients").glob("*/round-*.safetensors"))
    assert len(memory) == 3 * 2
    assert not (tmp_path / "plain" / "_clients").exists()


def test_fedprox_pulls_towards_the_proxy(llama_base, lora, tmp_path):
    def distance(mu):
        trainer = run(
            llama_base,
            tmp_path / str(mu),
            lora,
            num_rounds=1,
            max_steps=8,
            fedprox_mu=mu,
            optim="sgd",
            learning_rate=0.1,
        )
        return sum(float(value.square().sum()) for _, update in trainer.sent for value in update.delta.values())

    assert distance(5.0) < 0.7 * distance(0.0)


def test_clipping_at_the_client_and_the_bound_at_the_server(llama_base, lora, tmp_path):
    trainer = run(llama_base, tmp_path / "clip", lora, clip_update_norm=0.01, max_update_norm=0.0101)
    for _, update in trainer.sent:
        norm = sum(float(value.square().sum()) for value in update.delta.values()) ** 0.5
        assert norm == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(RuntimeError, match="its norm is .*at most 0.0001"):
        run(llama_base, tmp_path / "bound", lora, max_update_norm=0.0001)


def test_over_sampled_round_closes_with_the_first(llama_base, lora, tmp_path):
    trainer = run(llama_base, tmp_path, lora, clients_per_round=2, over_sample=0.5, num_rounds=1)
    record = trainer.server.store.records()[1]
    assert len(trainer.sent) == len(record["clients"]) == 2
    assert list(record["rejected"].values()) == ["the round closed without it"]
