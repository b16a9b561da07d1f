# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation under secure aggregation is the plain one of uniform weights, to within the fixed point; resumed, too."""

import json

import pytest
import torch

from fedlpp_hf import FederatedCallback, FederatedTrainer, RoundStore
from fedlpp_hf.privacy.secure_sums.client import SumClient
from fedlpp_hf.server.loop import FederatedServer
from fedlpp_hf.tensors.adapters import read_adapter
from tests.helpers import assert_equal, make_rows, make_trainer


pytest.importorskip("Crypto", reason="needs the extra [privacy]")

PLAIN = {"num_rounds": 1, "weighting": "uniform", "clip_update_norm": 1.0, "adapter_bits": 32}
SECURE = PLAIN | {"secure_aggregation": True, "secure_threshold": 0.5}


def run(base, output_dir, lora, resume=None, cls=FederatedTrainer, **options):
    """The record of each round, and the adapter."""
    trainer = make_trainer(str(base), output_dir, lora, cls=cls, **options)
    trainer.train(resume_from_checkpoint=resume)
    return RoundStore(output_dir).records(), read_adapter(output_dir)[0]


def find_distance(left, right):
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).abs().max()) for key in left)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"aggregation": "freeze_a", "update_bits": 4}, marks=pytest.mark.slow),
        pytest.param({"broadcast": "never", "num_rounds": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"num_rounds": 2, "server_optimizer": "yogi", "server_learning_rate": 0.01}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_equals_plain_federation(llama_base, lora, tmp_path, options):
    plain_records, plain = run(llama_base, tmp_path / "plain", lora, **PLAIN | options)
    records, secure = run(llama_base, tmp_path / "secure", lora, **SECURE | options)
    found = records[1]["sum"]
    assert (found["members"], found["threshold"], found["losses"], found["steps"]) == (3, 2, 3, 6)
    # What the sum rounds, and what float32 does, of which a second round makes more.
    largest = max(float(tensor.abs().max()) for tensor in plain.values())
    bound = found["largest_error"] + largest * 2**-23
    assert find_distance(plain, secure) <= (bound if len(records) == 2 else 1e-5)
    plain_losses = [client["loss"] for client in plain_records[1]["clients"].values()]
    assert found["loss"] == pytest.approx(sum(plain_losses) / 3, abs=1e-5)
    # Of single clients the record says what the server knows of them: that they were asked, and are in the sum.
    assert records[1]["clients"] == {f"site-{number}": {"num_examples": None} for number in range(3)}
    assert records[1]["rejected"] == {}
    assert records[1]["bytes_up"] > 3 * 4 * sum(delta.numel() for delta in secure.values()) / 2
    assert (tmp_path / "secure" / "report.md").read_text().count("site-1") == (
        (tmp_path / "plain" / "report.md").read_text().count("site-1")
    )
    assert not list((tmp_path / "secure" / "_federation").glob("updates*"))


class OneFails(FederatedTrainer):
    def train_client(self, task, rows=None):
        if task.client_id == "site-1":
            raise ValueError("no rows today")
        return super().train_client(task, rows)


@pytest.mark.slow
def test_client_that_fails_is_not_in_the_sum(llama_base, lora, tmp_path):
    rows, heard = make_rows(clients=4), []

    class Listener(FederatedCallback):
        def on_client_end(self, args, state, control, *, client_id, metrics, reason, **kwargs):
            heard.append((client_id, metrics, bool(reason)))

    def run_one(output_dir, cls, train_dataset, **options):
        trainer = make_trainer(str(llama_base), output_dir, lora, cls=cls, train_dataset=train_dataset, **options)
        trainer.add_callback(Listener())
        trainer.train()
        return RoundStore(output_dir).records(), read_adapter(output_dir)[0]

    records, secure = run_one(tmp_path / "secure", OneFails, rows, **SECURE)
    assert list(records[1]["clients"]) == ["site-0", "site-2", "site-3"]
    assert list(records[1]["rejected"]) == ["site-1"]
    assert heard == [("site-1", None, True)] + [(f"site-{number}", {}, False) for number in (0, 2, 3)]
    _, plain = run_one(tmp_path / "plain", OneFails, rows, **PLAIN)
    assert find_distance(plain, secure) < 1e-7


def test_too_few_clients_open_nothing(llama_base, lora, tmp_path):
    with pytest.raises(RuntimeError, match="Round 1 has 0 acceptable updates.*2 clients are ready, and a sum needs 3"):
        run(llama_base, tmp_path, lora, cls=OneFails, **SECURE)
    assert RoundStore(tmp_path).latest() == 0


def test_update_that_could_overflow_is_not_sent(llama_base, lora, tmp_path):
    """Nothing is clipped in silence: without the option that clips, the client refuses."""
    options = {name: value for name, value in SECURE.items() if name != "clip_update_norm"}
    with pytest.raises(RuntimeError, match="value of magnitude .* the sum holds up to 0.0001"):
        run(llama_base, tmp_path, lora, **options | {"max_update_norm": 0.0001})


@pytest.mark.parametrize("moment", ["masked", pytest.param("open", marks=pytest.mark.slow)])
def test_round_that_crashed_is_redone(llama_base, lora, tmp_path, monkeypatch, moment):
    """With fresh keys, if nothing was opened; else from the sum that was written down, and no client is asked again."""
    expected = run(llama_base, tmp_path / "expected", lora, **SECURE)[1]
    sent, trained = [], []
    answer = SumClient.answer

    def listen(self, step, request):
        data = answer(self, step, request)
        if step == "shares":
            sent.append((self.client_id, self.keys.mask_key, data))
        return data

    monkeypatch.setattr(SumClient, "answer", listen)

    def crash(self, *arguments):
        raise KeyboardInterrupt

    class Counted(FederatedTrainer):
        def train_client(self, task, rows=None):
            trained.append(task.client_id)
            return super().train_client(task, rows)

    with monkeypatch.context() as patch:
        if moment == "open":
            patch.setattr(FederatedServer, "_step", crash)
        else:
            patch.setattr("fedlpp_hf.privacy.secure_sums.server.SumServer.make_survivors", crash)
        with pytest.raises(KeyboardInterrupt):
            run(llama_base, tmp_path / "out", lora, cls=Counted, **SECURE)
    assert len(sent) == len(trained) == 3
    records, adapter = run(llama_base, tmp_path / "out", lora, resume=True, cls=Counted, **SECURE)
    assert_equal(adapter, expected)
    assert list(records[1]["clients"]) == ["site-0", "site-1", "site-2"]
    if moment == "open":
        assert len(sent) == len(trained) == 3
    else:
        assert len(trained) == 6
        assert len({key for _, key, _ in sent}) == 6 and len({data for _, _, data in sent}) == 6


@pytest.mark.slow
def test_updates_in_the_clear_are_not_taken(llama_base, lora, tmp_path):
    trainer = make_trainer(str(llama_base), tmp_path, lora, **SECURE)
    with pytest.raises(RuntimeError, match="it sent its update in the clear; secure_aggregation=True here"):
        trainer.train_remotely(trainer.train_clients, {f"site-{number}": 8 for number in range(3)})


@pytest.mark.slow
def test_clients_per_round_close_the_round(llama_base, lora, tmp_path):
    options = SECURE | {"clients_per_round": 3, "over_sample": 0.3}
    trainer = make_trainer(str(llama_base), tmp_path, lora, train_dataset=make_rows(clients=4), **options)
    trainer.train()
    (record,) = RoundStore(tmp_path).records()[1:]
    assert len(record["asked"]) == 4 and len(record["clients"]) == 3
    assert list(record["rejected"].values()) == ["the round closed without it"]
    json.dumps(record)
    assert all(torch.isfinite(tensor).all() for tensor in read_adapter(tmp_path)[0].values())
