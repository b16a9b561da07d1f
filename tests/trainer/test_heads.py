# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The class of the model, and heads that the checkpoint does not have: the same on every side, trained, or refused."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

from fedlpp_hf import FederatedTrainer, QuantizedBaseCallback, export_base, load_base
from fedlpp_hf.client.checks import find_peft_model
from fedlpp_hf.tensors.lora import PREFIX
from fedlpp_hf.trainer.model import start_adapter
from fedlpp_hf.trainer.publishing import MERGED_DIR
from tests.helpers import (
    SMALL_MODELS,
    assert_equal,
    make_args,
    make_labelled_rows,
    make_rows,
    make_sft_classes,
    make_tokenizer,
    make_trainer,
    task_of,
)


HEAD = f"{PREFIX}classifier.weight"
LORA = {"r": 4, "target_modules": ["query", "value"]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT without a head, and its base."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(SMALL_MODELS["bert"][1]).save_pretrained(folder / "full")
    export_base(folder / "full", folder / "base")
    return folder


def make_classifier(model, output_dir, lora=None, model_init_kwargs=None, model_class=None, **options):
    rows = make_labelled_rows()
    return FederatedTrainer(
        str(model) if not isinstance(model, torch.nn.Module) else model,
        make_args(output_dir, **options),
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=lora or LoraConfig(**LORA, task_type="SEQ_CLS"),
        model_init_kwargs=model_init_kwargs,
        model_class=model_class,
    )


@pytest.mark.slow
def test_a_token_classifier_is_one_on_both_sides(tmp_path):
    """Without `model_class` the owner took a language model, and measured its random head."""
    torch.manual_seed(0)
    BertForTokenClassification(SMALL_MODELS["bert"][1]).save_pretrained(tmp_path / "full")
    rows = make_rows()
    rows = rows.remove_columns("labels").add_column("labels", [[i % 3 for i in row] for row in rows["input_ids"]])
    trainer = FederatedTrainer(
        str(tmp_path / "full"), make_args(tmp_path / "out", num_rounds=1, base_bits=8, adapter_bits=32),
        train_dataset=rows, eval_dataset=rows, peft_config=LoraConfig(**LORA, task_type="TOKEN_CLS"),
    )  # fmt: skip
    trainer.train()
    record = trainer.server.store.records()[0]["metrics"]
    assert record["server"]["eval_loss"] == pytest.approx(record["proxy"]["eval_loss"], rel=0.02)
    assert trainer.blueprint.model_class is None
    merged = BertForTokenClassification.from_pretrained(tmp_path / "out" / MERGED_DIR)
    assert torch.equal(merged.classifier.weight, trainer.server.adapter[HEAD])


@pytest.mark.slow
def test_one_start_for_clients_and_server_where_nothing_is_broadcast(encoder, tmp_path):
    ends, trainers = [], []
    for seed in (1, 2):  # of the process: it must not matter
        torch.manual_seed(seed)
        trainer = make_classifier(
            encoder / "full", tmp_path / str(seed), num_rounds=1, broadcast="never", merge=False, seed=5,
            model_init_kwargs={"num_labels": 3},
        )  # fmt: skip
        trainer.train()
        assert_equal(trainer.server.store.load(0)[0], trainer.guard.initial)
        ends.append(trainer.server.adapter)
        trainers.append(trainer)
    assert_equal(*ends)
    other = make_classifier(encoder / "base", tmp_path / "other", seed=6, model_init_kwargs={"num_labels": 3})
    assert not torch.equal(other.guard.initial[HEAD], trainers[0].guard.initial[HEAD])


@pytest.mark.slow
def test_workers_start_at_the_same_head(encoder, tmp_path):
    ends = []
    for count in (1, 2):
        trainer = make_classifier(
            encoder / "base", tmp_path / str(count), client_workers=count, num_rounds=1, broadcast="never",
            model_init_kwargs={"num_labels": 3},
        )  # fmt: skip
        trainer.train()
        ends.append(trainer.server.adapter)
    torch.testing.assert_close(*ends)  # workers may have other numbers of threads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "missing", "line"),
    [
        ({"target_modules": ["query", "dense"]}, "`classifier.weight`, `classifier.bias`", "['classifier']"),
        ({"target_modules": ["query", "classifier"]}, "`classifier.weight`, `classifier.bias`", "['classifier']"),
        ({"target_modules": ["query"], "bias": "all"}, "`classifier.weight`", "['classifier']"),
    ],
)
def test_a_head_that_nobody_trains_is_refused_before_anything_is_written(encoder, tmp_path, lora, missing, line):
    for model in (encoder / "full", encoder / "base"):
        with pytest.raises(ValueError) as error:
            make_classifier(
                model, tmp_path / "out", LoraConfig(r=4, **lora), model_class=AutoModelForSequenceClassification
            )
        assert f"The checkpoint does not have {missing}" in str(error.value)
        assert f"Set modules_to_save={line} in the LoraConfig" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_pooler_that_the_checkpoint_does_not_have(tmp_path):
    """Of a masked language model: PEFT's task type trains the classifier, and nothing the pooler."""
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(SMALL_MODELS["bert"][1]).save_pretrained(tmp_path / "full")
    with pytest.raises(
        ValueError, match=r"`bert.pooler.dense.weight`, `bert.pooler.dense.bias` .*modules_to_save=\['pooler'\]"
    ):
        make_classifier(tmp_path / "full", tmp_path / "refused")
    both = LoraConfig(**LORA, task_type="SEQ_CLS", modules_to_save=["pooler", "classifier"])
    trainer = make_classifier(tmp_path / "full", tmp_path / "out", both, num_rounds=1, merge=False)
    pooler = f"{PREFIX}bert.pooler.dense.weight"
    trainer.train()
    assert_equal(trainer.server.store.load(0)[0], trainer.guard.initial)
    assert not torch.equal(trainer.server.adapter[pooler], trainer.guard.initial[pooler])


def test_models_that_are_passed_are_checked_too(encoder, tmp_path):
    model = load_base(encoder / "base", AutoModelForSequenceClassification, num_labels=3)
    with pytest.raises(ValueError, match="does not have `classifier.weight`"):
        make_classifier(model, tmp_path, LoraConfig(**LORA))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    callback = QuantizedBaseCallback(task_dir=tmp_path, update_dir=tmp_path)
    with pytest.raises(ValueError, match="does not have `classifier.weight`"):  # a partner's own script
        Trainer(find_peft_model(get_peft_model(model, LoraConfig(**LORA))), args, callbacks=[callback])


def test_a_checkpoint_without_a_head_needs_a_task(encoder, tmp_path):
    for model in (encoder / "full", encoder / "base"):
        with pytest.raises(ValueError, match=r"a BertModel, which has no head and computes no loss. .*task_type"):
            make_classifier(model, tmp_path / "out", LoraConfig(**LORA))
    assert not (tmp_path / "out").exists()


def test_a_head_of_another_size(full_bert, tmp_path):
    export_base(full_bert, tmp_path / "base")
    with pytest.raises(ValueError, match="head of another size than model_init_kwargs={'num_labels': 5} asks for"):
        make_classifier(tmp_path / "base", tmp_path / "refused", model_init_kwargs={"num_labels": 5})


@pytest.mark.slow
def test_a_new_head_of_another_size(full_bert, tmp_path):
    trainer = make_classifier(
        full_bert, tmp_path / "out", num_rounds=1,
        model_init_kwargs={"num_labels": 5, "ignore_mismatched_sizes": True},
    )  # fmt: skip
    trainer.train()
    assert trainer.server.adapter[HEAD].shape == (5, 64)
    assert_equal(trainer.server.store.load(0)[0], trainer.guard.initial)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / MERGED_DIR)
    assert merged.num_labels == 5 and torch.equal(merged.classifier.weight, trainer.server.adapter[HEAD])


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [("quantization_config", {"load_in_4bit": True}, "base_bits"), ("trust_remote_code", True, "model_class")],
)
def test_arguments_of_the_model_that_a_base_can_not_have(encoder, tmp_path, name, value, instead):
    with pytest.raises(ValueError, match=f"model_init_kwargs has {name}=.*{instead}"):
        make_classifier(encoder / "base", tmp_path, model_init_kwargs={name: value})


def test_arguments_of_the_model_in_trls_configuration(llama_base, lora, tmp_path):
    FederatedSFTConfig, FederatedSFTTrainer = make_sft_classes()
    args = make_args(tmp_path, FederatedSFTConfig, bf16=False, model_init_kwargs={"attn_implementation": "eager"})
    rows = make_rows().remove_columns(["attention_mask"])
    trainer = FederatedSFTTrainer(
        str(llama_base), args, train_dataset=rows, processing_class=make_tokenizer(), peft_config=lora
    )
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.args.model_init_kwargs == {"attn_implementation": "eager"}


def test_the_server_starts_from_the_owners_head_unless_clients_have_a_trained_one(full_bert, tmp_path):
    """The base's head is coarser than the owner's; one that the user trained is better than both."""
    export_base(full_bert, tmp_path / "base")
    own_head = load_file(full_bert / "model.safetensors")["classifier.weight"]
    for trained in (False, True):
        model = load_base(tmp_path / "base")
        peft_model = get_peft_model(model, LoraConfig(**LORA, task_type="SEQ_CLS"))
        trainer = FederatedTrainer(peft_model, make_args(tmp_path / "out"), train_dataset=make_labelled_rows())
        head = trainer.guard.parameters[HEAD]
        if trained:
            head.data.add_(1.0)
        initial = {key: parameter.detach().clone() for key, parameter in trainer.guard.parameters.items()}
        start = start_adapter(peft_model, initial, initial | {HEAD: own_head})
        assert torch.equal(start[HEAD], head if trained else own_head)


@pytest.mark.slow
def test_magnitudes_are_the_full_models(full_llama, lora, tmp_path):
    """DoRA's start is the norm of the base's rows, which the quantizer has changed: the server's model would move."""
    lora.use_dora = True
    rows = make_rows()
    trainer = FederatedTrainer(
        str(full_llama), make_args(tmp_path, num_rounds=1, base_bits=2, learning_rate=0.0, adapter_bits=32),
        train_dataset=rows, eval_dataset=rows, peft_config=lora,
    )  # fmt: skip
    trainer.train()
    stored, merged = (load_file(place / "model.safetensors") for place in (full_llama, tmp_path / MERGED_DIR))
    for name, value in stored.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-7)


def test_merged_and_trained_heads_are_plain_peft(encoder, tmp_path):
    trainer = make_classifier(encoder / "base", tmp_path, num_rounds=1, model_init_kwargs={"num_labels": 3})
    trainer.train()
    full = AutoModelForSequenceClassification.from_pretrained(encoder / "full", num_labels=3)
    served = PeftModel.from_pretrained(full, tmp_path)
    assert torch.equal(served.base_model.model.classifier.weight, trainer.server.adapter[HEAD])


def test_trls_rounding_of_the_start_is_undone(llama_base, lora, tmp_path):
    """It casts the adapter of a quantized model to bfloat16: clients and owner would start apart."""
    FederatedSFTConfig, FederatedSFTTrainer = make_sft_classes()
    rows = make_rows().remove_columns(["attention_mask"])
    plain = FederatedTrainer(str(llama_base), make_args(tmp_path), train_dataset=make_rows(), peft_config=lora)
    args = make_args(tmp_path, FederatedSFTConfig, bf16=False)
    trainer = FederatedSFTTrainer(
        str(llama_base), args, train_dataset=rows, processing_class=make_tokenizer(), peft_config=lora
    )
    assert_equal(trainer.guard.initial, plain.guard.initial)
    assert_equal({key: value.detach() for key, value in trainer.guard.parameters.items()}, plain.guard.initial)


class AdjustedByHand(FederatedTrainer):
    """What `logit_adjustment=1` does, in the trainer's own loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        if model.training:
            counts = torch.bincount(torch.tensor(self.train_dataset["labels"]), minlength=3) + 1.0
            logits = logits + (counts / counts.sum()).double().log()
        loss = torch.nn.functional.cross_entropy(logits.float(), inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def test_clients_train_with_adjusted_logits(encoder, tmp_path):
    options = {"num_rounds": 1, "learning_rate": 1e-3}
    plain, adjusted, by_hand = (
        make_classifier(encoder / "base", tmp_path / name, **options) for name in ("plain", "adjusted", "by-hand")
    )
    adjusted.args.logit_adjustment = 1.0
    by_hand.__class__ = AdjustedByHand
    updates = [trainer.train_client(task_of(trainer)).delta for trainer in (plain, adjusted, by_hand)]
    for key, value in updates[1].items():
        torch.testing.assert_close(value, updates[2][key], rtol=1e-3, atol=1e-6)
    assert not all(torch.equal(updates[0][key], value) for key, value in updates[1].items())
    assert not adjusted.model.base_model.model.classifier.modules_to_save["default"]._forward_hooks


def test_adjustment_is_refused_before_anything_trains(llama_base, lora, tmp_path):
    with pytest.raises(ValueError, match="logit_adjustment needs a classifier"):
        make_trainer(load_base(llama_base), tmp_path, lora, logit_adjustment=1.0)
