# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What is saved and pushed after `train()`, as users of a Trainer expect it, and who may see it."""

import json

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoTokenizer

from fedlpp_hf import FederatedTrainer, RoundStore, load_base
from fedlpp_hf.tensors.adapters import read_adapter
from tests.helpers import assert_equal, make_args, make_rows, make_tokenizer, make_trainer


def train_one(base, output_dir, lora, **options):
    trainer = make_trainer(load_base(base), output_dir, lora, **{"num_rounds": 1, "max_steps": 1, **options})
    trainer.train()
    return trainer


def test_saved_model_is_the_adapter_with_its_tokenizer(llama_base, lora, tmp_path):
    trainer = FederatedTrainer(
        load_base(llama_base), make_args(tmp_path / "out", num_rounds=1), train_dataset=make_rows(),
        processing_class=make_tokenizer(), peft_config=lora,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert_equal(read_adapter(tmp_path / "saved")[0], dict(trainer.server.adapter))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == len(make_tokenizer())
    trainer.save_model()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_saving_keeps_what_the_adapters_rank_can_not_hold(llama_base, lora, tmp_path):
    trainer = train_one(llama_base, tmp_path, lora, aggregation="exact")
    published = (tmp_path / "adapter_model.safetensors").read_bytes()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == published
    assert read_adapter(tmp_path)[0].keys() == trainer.server.adapter.keys()


def test_untrained_adapter_does_not_replace_a_federations(llama_base, lora, tmp_path):
    train_one(llama_base, tmp_path, lora)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    again = make_trainer(load_base(llama_base), tmp_path, lora, num_rounds=1, max_steps=1)
    for call in (again.save_model, again.push_to_hub):
        with pytest.raises(
            ValueError, match="has the adapter of a federation of 1 rounds, and this trainer has trained none"
        ):
            call()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    again.save_model(str(tmp_path / "elsewhere"))
    again.train(resume_from_checkpoint=True)
    again.save_model()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_repository_is_private_from_the_start(llama_base, lora, tmp_path, hub):
    trainer = make_trainer(
        load_base(llama_base), tmp_path / "out", lora, num_rounds=1, max_steps=1, push_to_hub=True, hub_token="writer"
    )
    assert hub.repos["owner/out"].private and trainer.hub_model_id == "owner/out"
    trainer.train()
    assert set(hub.files("owner/out")) == {".gitattributes"}
    # As Transformers' example scripts call it.
    kwargs = {"finetuned_from": str(llama_base), "tasks": "text-generation", "dataset": "Stories", "language": "en"}
    trainer.push_to_hub(**kwargs, tags=["stories"], license="mit")
    assert set(hub.files("owner/out")) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    text = hub.files("owner/out")["README.md"].data.decode()
    card = ModelCard(text).data.to_dict()
    assert (card["language"], card["license"], card["pipeline_tag"]) == ("en", "mit", "text-generation")
    assert {"stories", "fedlpp_hf"} <= set(card["tags"]) and card["datasets"] == ["Stories"]
    assert str(llama_base) not in text and str(tmp_path) not in text
    trainer.save_model()  # pushes, too, as a Trainer's does
    with pytest.raises(ValueError, match="push_to_hub has no argument 'privat'"):
        trainer.push_to_hub(privat=True)


@pytest.mark.parametrize("exists", [True, False])
def test_public_repository_is_refused_before_anything_is_trained(llama_base, lora, tmp_path, hub, exists):
    if exists:
        hub.add_repo("owner/public", {}, private=False)
    options = {} if exists else {"hub_private_repo": False}
    with pytest.raises(ValueError, match="`owner/public` is or would be public"):
        make_trainer(
            load_base(llama_base),
            tmp_path,
            lora,
            push_to_hub=True,
            hub_token="writer",
            hub_model_id="owner/public",
            **options,
        )
    assert exists or "owner/public" not in hub.repos
    assert RoundStore(tmp_path).latest() is None


@pytest.mark.parametrize("how", ["offline", "unreachable", "unauthorized"])
def test_push_without_a_hub_ends_in_one_line(llama_base, lora, tmp_path, hub, monkeypatch, how):
    trainer = train_one(llama_base, tmp_path / "out", lora, hub_model_id="owner/out")
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "unreachable":
        hub.shutdown()
        hub.server_close()
    token = "nobody" if how == "unauthorized" else "writer"
    said = {"offline": "HF_HUB_OFFLINE is set", "unreachable": "can't be reached", "unauthorized": "(401)"}[how]
    for push in (
        lambda: trainer.push_to_hub(token=token),
        lambda: make_trainer(
            load_base(llama_base), tmp_path / "new", lora, push_to_hub=True, hub_model_id="owner/out", hub_token=token
        ),
    ):
        with pytest.raises(RuntimeError) as error:
            push()
        assert said in str(error.value) and "owner/out" in str(error.value)
        assert how == "unauthorized" or "\n" not in str(error.value)


def test_model_card(llama_base, lora, tmp_path):
    trainer = train_one(llama_base, tmp_path / "out", lora, eval_dataset=make_rows())
    trainer.create_model_card(
        model_name="stories-lora", dataset_name="Stories", tags="stories", finetuned_from="org/full"
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.text.strip().startswith("# stories-lora") and "base + last proxy" in card.text
    assert card.data.tags[0] == "stories" and card.data.base_model == "org/full"
    assert str(tmp_path) not in card.content
    with pytest.raises(ValueError, match="create_model_card has no argument 'licence'"):
        trainer.create_model_card(licence="mit")


def test_model_card_before_anything_was_trained(llama_base, lora, tmp_path):
    trainer = make_trainer(load_base(llama_base), tmp_path, lora)
    trainer.save_model()
    trainer.create_model_card()
    assert "records were not available when this card was written" in (tmp_path / "README.md").read_text()


def test_what_scripts_do_after_training(llama_base, lora, tmp_path):
    """The last lines of Transformers' example scripts."""
    rows = make_rows()
    trainer = make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=rows, num_rounds=2)
    result = trainer.train()
    metrics = result.metrics
    assert {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"} <= metrics.keys()
    assert result.global_step == 2 and metrics["train_loss"] == result.training_loss > 0
    assert metrics["train_steps_per_second"] == pytest.approx(2 * 3 * 2 / metrics["train_runtime"], rel=0.01)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    rounds = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in rounds] == [0, 1, 2] and state["global_step"] == 2
    records = trainer.server.store.records()
    assert [entry["eval_loss"] for entry in rounds] == [record["metrics"]["proxy"]["eval_loss"] for record in records]
    assert "train_loss" in state["log_history"][-1]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == records[-1]["metrics"]["proxy"]["eval_loss"] and metrics["epoch"] == 2
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card()
    assert json.loads((tmp_path / "all_results.json").read_text())["train_loss"] == result.training_loss


@pytest.mark.parametrize("options", [{}, {"adapter_bits": 2}, {"broadcast": "never", "num_rounds": 1}], ids=str)
def test_live_model_is_what_a_client_holds(llama_base, lora, tmp_path, options):
    rows = make_rows()
    trainer = make_trainer(
        load_base(llama_base), tmp_path, lora, eval_dataset=rows, **{"learning_rate": 0.05, **options}
    )
    before = trainer.predict(rows).predictions
    trainer.train()
    view = trainer.server.store.records()[-1 if "adapter_bits" in options or not options else 0]["metrics"]["proxy"]
    assert trainer.evaluate()["eval_loss"] == view["eval_loss"]
    same = bool((trainer.predict(rows).predictions == before).all())
    assert same == ("broadcast" in options)
    with pytest.raises(ValueError, match="Only the owner's process can evaluate the server's model, and `full_model`"):
        trainer.evaluate_server()


def test_resumed_federation_with_no_round_left_has_its_history(llama_base, lora, tmp_path):
    rows = make_rows()
    first = make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=rows)
    first.train()
    again = make_trainer(load_base(llama_base), tmp_path, lora, eval_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path))
    assert again.state.log_history[:-1] == first.state.log_history[:-1] and again.state.global_step == 2
    assert again.evaluate()["eval_loss"] == first.evaluate()["eval_loss"]
    assert all(torch.equal(first.server.adapter[key], value) for key, value in again.server.adapter.items())
