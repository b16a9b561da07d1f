# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Rows of each client, prepared as its trainer does it, and what a trainer must not carry from client to client."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from fedlpp_hf import FederatedConfig, FederatedMixin, FederatedTrainer, export_base, load_base
from tests.helpers import make_args, make_rows, make_tokenizer, make_trainer
from tests.trainer.cases import find_trainer, list_cases
from tests.trainer.cases import make_rows as make_kind


class Preparing(Trainer):
    """Prepares rows in its constructor, as many people's trainers do: some are changed, some are left out."""

    def __init__(self, *args, train_dataset=None, **kwargs):
        def prepare(row):
            return {"labels": row["input_ids"]}

        rows = train_dataset.filter(lambda row: row["input_ids"][0] % 2 == 0).map(prepare)
        super().__init__(*args, train_dataset=rows, **kwargs)


class FederatedPreparing(FederatedMixin, Preparing):
    pass


def test_a_constructor_that_prepares_rows(llama_base, lora, tmp_path):
    rows = make_rows().remove_columns("labels")
    expected = {
        client: [
            row
            for row, site in zip(rows["input_ids"], rows["client"], strict=True)
            if site == client and row[0] % 2 == 0
        ]
        for client in sorted(set(rows["client"]))
    }
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, FederatedPreparing, train_dataset=rows)
    found = {client: list(part["input_ids"]) for client, part in trainer.client_datasets.items()}
    assert found == expected and len(set(map(len, found.values()))) > 1
    assert all(
        part.column_names == ["input_ids", "attention_mask", "client", "labels"]
        for part in trainer.client_datasets.values()
    )
    trainer.train()


def test_rows_that_can_not_be_put_together(llama_base, lora, tmp_path):
    class Renaming(Trainer):
        def __init__(self, *args, train_dataset=None, **kwargs):
            super().__init__(*args, train_dataset=train_dataset.select_columns(["input_ids", "labels"]), **kwargs)

    class FederatedRenaming(FederatedMixin, Renaming):
        pass

    with pytest.raises(ValueError, match="FederatedRenaming's constructor makes other rows .* Prepare the rows first"):
        make_trainer(load_base(llama_base), tmp_path, lora, FederatedRenaming)
    alone = {"only": make_rows()}  # of one client, they are the constructor's
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, FederatedRenaming, train_dataset=alone)
    assert trainer.client_datasets["only"].column_names == ["input_ids", "labels"]


def test_the_trainers_own_method_by_whatever_it_takes(llama_base, lora, tmp_path):
    calls = []

    class Tokenizing(Trainer):
        def __init__(self, *, extra, train_dataset, args, **kwargs):
            train_dataset = self._prepare_dataset(args, extra, rows=train_dataset)
            super().__init__(train_dataset=train_dataset, args=args, **kwargs)

        def _prepare_dataset(self, args, extra, *, rows, name="train"):
            calls.append((extra, len(rows), name))
            return rows.select(range(4))

    class FederatedTokenizing(FederatedMixin, Tokenizing):
        pass

    trainer = FederatedTokenizing(
        load_base(llama_base), make_args(tmp_path), train_dataset=make_rows(), peft_config=lora, extra="mine"
    )
    assert calls == [("mine", 8, "train")] * 3
    assert {len(part) for part in trainer.client_datasets.values()} == {4}


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [("ref_model", object(), "the base with the adapter"), ("quantization_config", object(), "args.base_bits")],
)
def test_arguments_that_a_federation_can_not_have(llama_base, lora, tmp_path, name, value, instead):
    with pytest.raises(ValueError, match=f"`{name}`.*{instead}"):
        FederatedTrainer(
            load_base(llama_base), make_args(tmp_path), train_dataset=make_rows(), peft_config=lora, **{name: value}
        )


def make_case(name, base, output_dir, **options):
    case = next(case for case in list_cases() if case.trainer == name)
    config_class, trainer_class = find_trainer(name)
    options = {"num_clients": 2, "partition": "iid", "bf16": False, "max_steps": 3, **case.options, **options}
    return trainer_class(
        str(base), make_args(output_dir, config_class, **options), train_dataset=make_kind(case.rows, 0),
        peft_config=case.peft_config, **case.make_arguments(),
    )  # fmt: skip


def test_clients_of_an_online_trainer_see_their_own_completions(llama_base, tmp_path):
    """GRPO keeps what it generated for several steps; three steps end in the middle of it."""
    trainer = make_case("GRPOTrainer", llama_base, tmp_path, gradient_accumulation_steps=2, num_rounds=2, max_steps=3)
    seen, seeds = {}, []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            assert trainer._buffered_inputs is None and trainer._step == 0
            seeds.append(args.seed)

    generate = trainer._generate_and_score_completions

    def note(inputs):
        seen.setdefault(trainer.guard.task.client_id, set()).update(row["prompt"] for row in inputs)
        return generate(inputs)

    trainer._generate_and_score_completions = note
    trainer.add_callback(Watch())
    trainer.train()
    own = {client: set(rows["prompt"]) for client, rows in trainer.client_datasets.items()}
    assert {client: prompts <= own[client] for client, prompts in seen.items()} == {"client-0": True, "client-1": True}
    assert len(set(seeds)) == 4 and trainer.args.seed not in seeds  # the sampler's, of each client and round


def test_the_clients_name_is_no_text_to_embed(tmp_path):
    """Trainers of sentence-transformers take every column for one more text, here for one more wrong answer."""
    case = next(case for case in list_cases() if case.trainer == "SentenceTransformerTrainer")
    config_class, trainer_class = find_trainer(case.trainer)
    full, base = tmp_path / "full", tmp_path / "base"
    case.build_model().save_pretrained(full)
    make_tokenizer().save_pretrained(full)
    export_base(full, base)
    rows = make_kind(case.rows, 0)
    rows = rows.add_column("team", [f"team-{row % 2}" for row in range(len(rows))])
    trainer = trainer_class(
        str(base),
        make_args(tmp_path / "out", config_class, partition="team", bf16=False),
        train_dataset=rows,
        peft_config=case.peft_config,
        **case.make_arguments(),
    )
    assert {client: len(part) for client, part in trainer.client_datasets.items()} == {"team-0": 8, "team-1": 8}
    assert {tuple(part.column_names) for part in trainer.client_datasets.values()} == {("anchor", "positive")}


def test_a_rule_that_freezes_factors_where_the_reference_is_switched_to(llama_base, tmp_path):
    with pytest.raises(ValueError, match="aggregation='freeze_a' does not go with gradient_checkpointing=True here"):
        make_case("DPOTrainer", llama_base, tmp_path / "refused", aggregation="freeze_a")
    trainer = make_case("DPOTrainer", llama_base, tmp_path, aggregation="freeze_a", gradient_checkpointing=False)
    trainer.train()
    begun = trainer.server.store.load(0)[0]
    for key, value in trainer.server.adapter.items():
        assert torch.equal(value, begun[key]) == (".lora_A." in key), key


def test_sft_rows_of_a_federation_without_clients_here(llama_base, lora, tmp_path):
    """A server over a network has no clients' rows; TRL's trainers insist on some."""
    config_class, trainer_class = find_trainer("SFTTrainer")
    arguments = {"peft_config": lora, "processing_class": make_tokenizer()}
    args = make_args(tmp_path, config_class, bf16=False, max_length=12)
    rows = make_rows().remove_columns(["attention_mask"])
    trainer = trainer_class(str(llama_base), args, train_dataset={}, eval_dataset=rows, **arguments)
    assert trainer.client_datasets == {}


def test_rows_of_other_kinds_pass_a_plain_trainer(llama_base, lora, tmp_path):
    rows = [dict(row) for row in make_rows().remove_columns("client").with_format("torch")]
    trainer = FederatedTrainer(
        load_base(llama_base), FederatedConfig(str(tmp_path), num_rounds=1, use_cpu=True, max_steps=1, disable_tqdm=True),
        train_dataset={"a": torch.utils.data.Subset(rows, range(4)), "b": Dataset.from_list(rows)}, peft_config=lora,
    )  # fmt: skip
    trainer.train()
    assert set(trainer.server.store.records()[-1]["clients"]) == {"a", "b"}
