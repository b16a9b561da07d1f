# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Identities of the federated trainer, its bad inputs, and the ways in which users make their own trainer federated."""

import gc
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from fedlpp_hf import (
    FederatedConfig,
    FederatedMixin,
    FederatedTrainer,
    QuantizedBaseCallback,
    RoundStore,
    export_base,
    load_base,
)
from fedlpp_hf.client.guard import TASK_FILE, UPDATE_FILE
from fedlpp_hf.server.loop import FederatedServer
from fedlpp_hf.tensors.adapters import adapter_parameters, copy_adapter, read_adapter
from fedlpp_hf.wire.messages import ClientUpdate

from .conftest import make_rows


def make_args(output_dir, cls=FederatedConfig, **options):
    defaults = {
        "num_rounds": 2,
        "partition": "client",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(str(output_dir), **{**defaults, **options})


def make_trainer(model, output_dir, lora, cls=FederatedTrainer, train_dataset=None, eval_dataset=None, **options):
    rows = make_rows() if train_dataset is None else train_dataset
    return cls(
        model, make_args(output_dir, **options), train_dataset=rows, eval_dataset=eval_dataset, peft_config=lora
    )


def make_sft_classes():
    """TRL's configuration and trainer, federated as the README says; a test that asks for them skips without TRL."""
    trl = pytest.importorskip("trl", reason="needs the extra [trl]")

    @dataclass
    class FederatedSFTConfig(trl.SFTConfig, FederatedConfig):
        pass

    class FederatedSFTTrainer(FederatedMixin, trl.SFTTrainer):
        pass

    return FederatedSFTConfig, FederatedSFTTrainer


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def full_model(directory):
    return AutoModelForCausalLM.from_pretrained(directory)


def task_of(trainer, client="site-0", number=1):
    """The task of one client in one round, as the server would send it."""
    tasks = []

    def collect(asked):
        tasks.extend(asked)
        raise StopIteration

    server = FederatedServer(
        trainer.args,
        trainer.guard.initial,
        trainer.model.peft_config["default"],
        {name: len(rows) for name, rows in trainer.client_datasets.items()},
        trainer.guard.fingerprint,
    )
    with pytest.raises(StopIteration):
        server.run(collect)
    return next(task for task in tasks if task.client_id == client)


class TestIdentities:
    def test_frozen_or_not_and_dequantized_or_not_is_the_same(self, llama_base, lora, tmp_path):
        """`train()` freezes what lives long, `train_client` alone does not; neither changes a bit, nor do held weights."""
        ends = []
        for name, options in (("plain", {}), ("held", {"hold_dequantized": True})):
            trainer = make_trainer(llama_base, tmp_path / name, lora, **options)
            task = task_of(trainer)
            ends.append(trainer.train_client(task).delta)  # nothing is frozen yet
            gc.freeze()
            ends.append(trainer.train_client(task).delta)
            gc.unfreeze()
        for other in ends[1:]:
            assert_equal(ends[0], other)

    def test_one_client_without_quantization_is_plain_trainer(self, full_llama, lora, tmp_path):
        rows = make_rows(clients=1)
        lora.lora_dropout = 0.1  # so that the random numbers matter, too
        federated = make_trainer(
            full_model(full_llama),
            tmp_path / "f",
            lora,
            train_dataset=rows,
            num_rounds=1,
            max_steps=3,
            base_bits=32,
            adapter_bits=32,
        )
        federated.train()
        task = task_of(
            make_trainer(
                full_model(full_llama),
                tmp_path / "t",
                lora,
                train_dataset=rows,
                num_rounds=1,
                base_bits=32,
                adapter_bits=32,
            )
        )

        set_seed(federated.args.seed)
        model = get_peft_model(full_model(full_llama), lora)
        args = TrainingArguments(
            str(tmp_path / "p"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
            seed=task.seed, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows).train()

        plain = copy_adapter(adapter_parameters(model))
        assert_equal(copy_adapter(federated.guard.parameters), plain)
        for key, value in federated.server.adapter.items():  # θ₀ + (θ₁ − θ₀) may differ in the last bit
            torch.testing.assert_close(value, plain[key], rtol=1e-6, atol=1e-8)
            if "lora_B" in key:
                assert torch.equal(value, plain[key])

    def test_equal_clients_are_any_one_of_them(self, llama_base, lora, tmp_path):
        rows = make_rows(8)
        # Rows in order, no dropout: then equal data are equal runs, whatever a client's seed.
        options = {"train_sampling_strategy": "sequential", "num_rounds": 2}
        many = make_trainer(
            load_base(llama_base), tmp_path / "many", lora, train_dataset=dict.fromkeys("abcd", rows), **options
        )
        one = make_trainer(load_base(llama_base), tmp_path / "one", lora, train_dataset={"b": rows}, **options)
        many.train()
        one.train()
        assert_equal(many.server.adapter, one.server.adapter)

    @pytest.mark.parametrize(
        "options",
        [
            {"server_momentum": 0.9, "clients_per_round": 2},
            {"broadcast": "2", "server_momentum": 0.5},
            {"broadcast": "never"},
            {"learning_rate_horizon": "federation", "adapter_bits": 2},
            {"update_bits": 2, "update_density": 0.5, "server_optimizer": "adam", "server_learning_rate": 0.05},
            {"scaffold": True, "optim": "sgd", "lr_scheduler_type": "constant", "clients_per_round": 2},
            {"aggregation": "exact", "residual_rank": 3, "client_ranks": {"site-1": 2}},
        ],
        ids=["momentum", "every-2", "never", "horizon", "compressed", "scaffold", "exact"],
    )
    def test_resumed_is_uninterrupted(self, llama_base, lora, tmp_path, options):
        options = {"num_rounds": 4, "max_steps": 1, **options}
        whole = make_trainer(load_base(llama_base), tmp_path / "whole", lora, **options)
        whole.train()

        class Dies(FederatedTrainer):
            def train_client(self, task):
                update = super().train_client(task)
                if task.round == 3:
                    raise KeyboardInterrupt
                return update

        with pytest.raises(KeyboardInterrupt):
            make_trainer(load_base(llama_base), tmp_path / "cut", lora, cls=Dies, **options).train()
        assert RoundStore(tmp_path / "cut").latest() == 2
        resumed = make_trainer(load_base(llama_base), tmp_path / "cut", lora, **options)
        resumed.train(resume_from_checkpoint=True)
        assert_equal(resumed.server.adapter, whole.server.adapter)
        assert_equal(read_adapter(tmp_path / "cut")[0], read_adapter(tmp_path / "whole")[0])

    def test_runs_are_deterministic_and_clients_differ(self, llama_base, lora, tmp_path):
        orders: dict[str, list] = {}

        class Watches(FederatedTrainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                orders.setdefault(f"{self.guard.task.round}/{self.guard.task.client_id}", []).append(
                    inputs["input_ids"][:, 0].tolist()
                )
                return super().compute_loss(model, inputs, *args, **kwargs)

        rows = make_rows(8)
        trainer = make_trainer(
            load_base(llama_base), tmp_path / "a", lora, cls=Watches, train_dataset={"a": rows, "b": rows}
        )
        trainer.train()
        first = dict(orders)
        assert len({str(order) for order in first.values()}) == 4  # two rounds of two clients, each its own order
        orders.clear()
        again = make_trainer(
            load_base(llama_base), tmp_path / "b", lora, cls=Watches, train_dataset={"a": rows, "b": rows}
        )
        again.train()
        assert orders == first
        assert_equal(trainer.server.adapter, again.server.adapter)

    def test_learning_rate_horizon(self, llama_base, lora, tmp_path):
        class Rates(TrainerCallback):
            def __init__(self):
                self.seen = []

            def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
                self.seen.append(optimizer.param_groups[0]["lr"])

        seen = {}
        for horizon in ("round", "federation"):
            rates = Rates()
            trainer = make_trainer(
                load_base(llama_base), tmp_path / horizon, lora, train_dataset={"a": make_rows(8)}, num_rounds=3,
                learning_rate_horizon=horizon, learning_rate=0.6,
            )  # fmt: skip
            trainer.add_callback(rates)
            trainer.train()
            seen[horizon] = rates.seen
        assert seen["round"] == pytest.approx([0.6, 0.3] * 3)
        assert seen["federation"] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])

    def test_never_broadcasting_averages_rounds(self, llama_base, lora, tmp_path):
        trainer = make_trainer(load_base(llama_base), tmp_path, lora, broadcast="never", num_rounds=2)
        updates = []
        run = trainer.train_client

        def spy(task):
            assert task.proxy is None
            update = run(task)
            updates.append(update)
            return update

        trainer.train_client = spy
        trainer.train()
        mean = {key: sum(update.delta[key].double() for update in updates) / len(updates) for key in updates[0].delta}
        for key, value in trainer.server.adapter.items():
            torch.testing.assert_close(
                value.double(), trainer.guard.initial[key].double() + mean[key], rtol=1e-5, atol=1e-8
            )


@pytest.mark.parametrize("bits", [8, 3, 2, 1])
def test_bases_of_all_bits_train(full_llama, lora, tmp_path, bits):
    export_base(full_llama, tmp_path / "base", bits=bits)
    rows = make_rows()
    trainer = make_trainer(load_base(tmp_path / "base"), tmp_path / "out", lora, eval_dataset=rows, max_steps=4)
    trainer.train()
    losses = [record["metrics"]["proxy"]["eval_loss"] for record in trainer.server.store.records()]
    assert losses[-1] < losses[0]


def test_trackers_see_rounds_and_no_client_runs(llama_base, lora, tmp_path, monkeypatch):
    seen = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append("begin")

        def on_log(self, args, state, control, logs, **kwargs):
            seen.append((state.global_step, logs))

        def on_train_end(self, args, state, control, **kwargs):
            seen.append("end")

    monkeypatch.setattr("fedlpp_hf.trainer.federated.get_reporting_integration_callbacks", lambda names: [Tracker])
    make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=make_rows(), logging_steps=1).train()
    assert (seen[0], seen[-1]) == ("begin", "end")
    assert [step for step, _ in seen[1:-1]] == [0, 1, 2]
    assert {"proxy/eval_loss", "clients/loss", "bytes_down", "bytes_up"} <= seen[2][1].keys()


class TestUsersOwnTrainers:
    def test_overridden_compute_loss_counts_on_clients_and_for_the_owner(self, full_llama, lora, tmp_path):
        rows = make_rows()
        plain, doubled = (
            make_trainer(
                str(full_llama), tmp_path / cls.__name__, lora, cls=cls, eval_dataset=rows, num_rounds=2, merge=False
            )
            for cls in (FederatedTrainer, DoubledLoss)
        )
        plain.train()
        doubled.train()
        before = [trainer.server.store.records()[0]["metrics"] for trainer in (plain, doubled)]
        for view in ("proxy", "server"):
            assert before[1][view]["eval_loss"] == pytest.approx(2 * before[0][view]["eval_loss"], rel=1e-6)

    def test_seq2seq(self, llama_base, lora, tmp_path):
        @dataclass
        class FederatedSeq2SeqConfig(Seq2SeqTrainingArguments, FederatedConfig):
            pass

        class FederatedSeq2SeqTrainer(FederatedMixin, Seq2SeqTrainer):
            pass

        rows = make_rows()
        trainer = FederatedSeq2SeqTrainer(
            load_base(llama_base),
            make_args(tmp_path, FederatedSeq2SeqConfig),
            train_dataset=rows,
            eval_dataset=rows,
            peft_config=lora,
        )
        trainer.train()
        records = trainer.server.store.records()
        assert records[-1]["metrics"]["proxy"]["eval_loss"] < records[0]["metrics"]["proxy"]["eval_loss"]

    def test_unmodified_trainer_with_the_callback_is_a_client(self, llama_base, lora, tmp_path):
        """Two rounds in which every client is a plain Trainer script with the callback, and files between them."""
        rows = make_rows()
        reference = make_trainer(load_base(llama_base), tmp_path / "server", lora, eval_dataset=rows)

        def train_clients(tasks):
            for task in tasks:
                task_dir, update_dir = tmp_path / "in", tmp_path / "out"
                task_dir.mkdir(exist_ok=True)
                (task_dir / TASK_FILE).write_bytes(task.to_bytes())
                run_client_script(llama_base, lora, task_dir, update_dir, reference.raw_datasets[task.client_id])
                yield ClientUpdate.from_bytes((update_dir / UPDATE_FILE).read_bytes())

        server = FederatedServer(
            reference.args, reference.guard.initial, reference.model.peft_config["default"],
            {client: len(data) for client, data in reference.client_datasets.items()}, reference.guard.fingerprint,
            evaluate_proxy=reference.evaluate_proxy,
        )  # fmt: skip
        records = server.run(train_clients)
        losses = [record["metrics"]["proxy"]["eval_loss"] for record in records]
        assert losses[2] < losses[1] < losses[0]
        assert all(client["steps"] == 2 for client in records[2]["clients"].values())

    def test_sft_trainer(self, full_llama, llama_base, lora, tmp_path):
        FederatedSFTConfig, FederatedSFTTrainer = make_sft_classes()
        rows = make_rows().remove_columns(["attention_mask"])
        trainer = FederatedSFTTrainer(
            load_base(llama_base), make_args(tmp_path, FederatedSFTConfig, bf16=False, max_length=12), train_dataset=rows,
            eval_dataset=rows, processing_class=make_tokenizer(), peft_config=lora,
        )  # fmt: skip
        assert all(p.dtype == torch.float32 for p in trainer.guard.parameters.values())
        trainer.train()
        losses = [record["metrics"]["proxy"]["eval_loss"] for record in trainer.server.store.records()]
        assert losses[-1] < losses[0]


class DoubledLoss(FederatedTrainer):
    def compute_loss(self, model, inputs, *args, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, *args, return_outputs=True, **kwargs)
        return (2 * loss, outputs) if return_outputs else 2 * loss


def make_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, 64)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def run_client_script(base, lora, task_dir, update_dir, rows):
    """What a partner's engineer has already, plus one callback."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    args = TrainingArguments(
        str(update_dir / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=rows, callbacks=[QuantizedBaseCallback(task_dir=task_dir, update_dir=update_dir)]
    )
    trainer.train()


class TestBadInput:
    def test_full_precision_model(self, full_llama, lora, tmp_path):
        with pytest.raises(ValueError, match="full-precision checkpoint.*fedlpp-hf quantize"):
            make_trainer(full_model(full_llama), tmp_path, lora)

    def test_model_without_adapter(self, llama_base, tmp_path):
        with pytest.raises(ValueError, match="peft_config"):
            make_trainer(load_base(llama_base), tmp_path, None)

    def test_trainable_base(self, llama_base, lora, tmp_path):
        model = get_peft_model(load_base(llama_base), lora)
        model.get_base_model().model.norm.weight.requires_grad_(True)
        with pytest.raises(ValueError, match=r"norm.weight` is trainable"):
            make_trainer(model, tmp_path, lora)

    def test_full_precision_layers_are_named(self, full_llama, lora, tmp_path, caplog):
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(full_llama, quantization_config=quantization)
        from transformers.utils import logging

        logging.enable_propagation()
        try:
            make_trainer(model, tmp_path, lora)
        finally:
            logging.disable_propagation()
        assert "lm_head" in caplog.text

    def test_other_base(self, llama_base, lora, tmp_path):
        trainer = make_trainer(load_base(llama_base), tmp_path, lora)
        task = task_of(trainer)
        trainer.guard.fingerprint = "0" * 64
        with pytest.raises(ValueError, match="The task is for the base"):
            trainer.train_client(task)

    def test_unknown_client(self, llama_base, lora, tmp_path):
        trainer = make_trainer(load_base(llama_base), tmp_path, lora)
        task = task_of(trainer)
        del trainer.client_datasets["site-0"]
        with pytest.raises(ValueError, match="site-0"):
            trainer.train_client(task)

    def test_base_that_moves(self, llama_base, lora, tmp_path):
        class Moves(FederatedTrainer):
            def compute_loss(self, model, *args, **kwargs):
                with torch.no_grad():
                    model.get_base_model().model.norm.weight.add_(1e-3)
                return super().compute_loss(model, *args, **kwargs)

        with pytest.raises(RuntimeError, match="norm.weight.*frozen"):
            make_trainer(load_base(llama_base), tmp_path, lora, cls=Moves).train()

    def test_base_that_moves_behind_autograd(self, llama_base, lora, tmp_path):
        class Moves(FederatedTrainer):
            def compute_loss(self, model, *args, **kwargs):
                model.get_base_model().model.norm.weight.data.add_(1e-3)
                return super().compute_loss(model, *args, **kwargs)

        with pytest.raises(RuntimeError, match="base differs"):
            make_trainer(load_base(llama_base), tmp_path, lora, cls=Moves).train()

    def test_existing_output_dir(self, llama_base, lora, tmp_path):
        make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=1).train()
        with pytest.raises(ValueError, match="--resume_from_checkpoint.*--overwrite"):
            make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=1).train()
        make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=1, overwrite=True).train()

    def test_resuming_with_other_arguments(self, llama_base, lora, tmp_path):
        make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=1).train()
        with pytest.raises(ValueError, match="learning_rate=0.01.*0.5"):
            make_trainer(load_base(llama_base), tmp_path, lora, learning_rate=0.5).train(resume_from_checkpoint=True)

    def test_resuming_nothing(self, llama_base, lora, tmp_path):
        with pytest.raises(ValueError, match="no federation to resume"):
            make_trainer(load_base(llama_base), tmp_path, lora).train(resume_from_checkpoint=True)

    def test_empty_client(self, llama_base, lora, tmp_path):
        with pytest.raises(ValueError, match="'b' has 0 rows"):
            make_trainer(
                load_base(llama_base), tmp_path, lora, train_dataset={"a": make_rows(), "b": make_rows().select([])}
            )

    def test_less_than_a_batch_where_short_batches_are_dropped(self, llama_base, lora, tmp_path):
        data = {"a": make_rows(), "b": make_rows(3)}
        make_trainer(load_base(llama_base), tmp_path, lora, train_dataset=data, num_rounds=1).train()
        with pytest.raises(ValueError, match=r"'b' has 3 rows; at least 4.*dataloader_drop_last=False"):
            make_trainer(load_base(llama_base), tmp_path, lora, train_dataset=data, dataloader_drop_last=True)

    def test_too_many_clients_per_round(self, llama_base, lora, tmp_path):
        with pytest.raises(ValueError, match="clients_per_round=4, but there are only 3"):
            make_trainer(load_base(llama_base), tmp_path, lora, clients_per_round=4)

    def test_optimizer_and_model_init_are_refused(self, llama_base, lora, tmp_path):
        with pytest.raises(ValueError, match="optimizers"):
            FederatedTrainer(
                load_base(llama_base),
                make_args(tmp_path),
                train_dataset=make_rows(),
                peft_config=lora,
                optimizers=(1, None),
            )
        with pytest.raises(ValueError, match="model_init"):
            FederatedTrainer(
                load_base(llama_base), make_args(tmp_path), train_dataset=make_rows(), peft_config=lora, model_init=1
            )

    def test_plain_training_arguments(self, llama_base, lora, tmp_path):
        with pytest.raises(ValueError, match="expected a FederatedConfig"):
            FederatedTrainer(
                load_base(llama_base), TrainingArguments(str(tmp_path)), train_dataset=make_rows(), peft_config=lora
            )

    def test_unsupported_targets(self, llama_base, tmp_path):
        with pytest.raises(ValueError, match="nonsense"):
            make_trainer(load_base(llama_base), tmp_path, LoraConfig(target_modules=["nonsense"]))

    def test_diverged_client_is_rejected_by_name(self, llama_base, lora, tmp_path):
        class Diverges(FederatedTrainer):
            def train_client(self, task):
                update = super().train_client(task)
                if task.client_id == "site-1":
                    next(iter(update.delta.values())).fill_(float("nan"))
                return update

        trainer = make_trainer(load_base(llama_base), tmp_path, lora, cls=Diverges, num_rounds=1)
        trainer.train()
        record = trainer.server.store.records()[1]
        assert list(record["clients"]) == ["site-0", "site-2"]
        assert "NaN" in record["rejected"]["site-1"]
        strict = make_trainer(load_base(llama_base), tmp_path, lora, cls=Diverges, min_clients=3, overwrite=True)
        with pytest.raises(RuntimeError, match=r"2 acceptable updates; min_clients=3.*site-1"):
            strict.train()

    def test_pushing_a_clients_files(self, llama_base, lora, tmp_path):
        callback = QuantizedBaseCallback(task_dir=tmp_path, update_dir=tmp_path)
        model = get_peft_model(load_base(llama_base), lora)
        args = TrainingArguments(str(tmp_path), use_cpu=True)
        trainer = Trainer(model, args, train_dataset=make_rows(), callbacks=[callback])
        with pytest.raises(RuntimeError, match="do not leave the client"):
            trainer.push_to_hub()
        with pytest.raises(ValueError, match="There is no task at"):
            trainer.train()
