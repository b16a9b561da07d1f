# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Options of the federation at work in real runs of the trainer: what is sent, what is trained, what is merged."""

import pytest
import torch

from fedlpp_hf import FederatedTrainer, load_base
from fedlpp_hf.tensors.adapters import lora_factors, read_adapter
from fedlpp_hf.trainer.publishing import MERGED_DIR
from fedlpp_hf.wire.messages import restore_tensors

from .conftest import make_rows
from .test_trainer import assert_equal, make_trainer


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
        assert torch.equal(value, held) == ("lora_A" in key)  # the server's A is what clients have, to the bit


def test_alternate_trains_b_then_a(llama_base, lora, tmp_path):
    trainer = run(llama_base, tmp_path, lora, aggregation="alternate")
    for task, update in trainer.sent:
        assert all(f"lora_{'B' if task.round == 1 else 'A'}" in key for key in update.delta)
        assert any(value.abs().max() > 0 for value in update.delta.values())


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


def test_stack_merges_what_is_never_sent(llama_base, lora, tmp_path):
    trainer = run(llama_base, tmp_path, lora, aggregation="stack", broadcast="never", num_rounds=1)
    adapter, config = read_adapter(tmp_path)
    assert (
        all(rank == lora.r * 5 for rank in config["rank_pattern"].values())
        or max(config["rank_pattern"].values()) > lora.r
    )
    assert adapter.keys() == trainer.server.adapter.keys()


def test_clients_of_lower_rank(llama_base, lora, tmp_path):
    trainer = run(llama_base, tmp_path, lora, client_ranks={"site-0": 1, "site-2": 3}, num_rounds=2)
    ranks = {"site-0": 1, "site-1": lora.r, "site-2": 3}
    for task, update in trainer.sent:
        for tensors in (restore_tensors(task.proxy), update.delta):
            for key, value in tensors.items():
                assert value.shape[0 if "lora_A" in key else 1] == ranks[task.client_id], key
    for key, value in trainer.server.adapter.items():
        assert value.shape == trainer.guard.initial[key].shape


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


def test_scaffold_equals_sgd_in_the_first_round(llama_base, lora, tmp_path):
    """Controls are zero at first, so that the first round is plain SGD; afterwards they correct."""
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "num_rounds": 2}
    plain = run(llama_base, tmp_path / "plain", lora, **options)
    scaffold = run(llama_base, tmp_path / "scaffold", lora, scaffold=True, **options)
    for (_, one), (_, other) in zip(plain.sent[:3], scaffold.sent[:3], strict=True):
        assert_equal(one.delta, other.delta)
    assert any(
        not torch.equal(one.delta[key], other.delta[key])
        for (_, one), (_, other) in zip(plain.sent[3:], scaffold.sent[3:], strict=True)
        for key in one.delta
    )
    assert all(task.control for task, _ in scaffold.sent[3:])


def test_a_failed_round_is_tried_again(llama_base, lora, tmp_path):
    class Flaky(FederatedTrainer):
        failures = 2

        def train_client(self, task):
            update = super().train_client(task)
            if Flaky.failures:
                Flaky.failures -= 1
                next(iter(update.delta.values())).fill_(float("nan"))
            return update

    trainer = make_trainer(
        load_base(llama_base), tmp_path, lora, cls=Flaky, num_rounds=1, min_clients=2, round_attempts=2
    )
    trainer.train()
    record = trainer.server.store.records()[1]
    assert len(record["clients"]) == 3
    assert len(record["rejected"]) == 2
