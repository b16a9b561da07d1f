# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Models of sentence-transformers: the transformer becomes a base, and the modules around it come along."""

import functools
import json

import pytest
import torch
from peft import LoraConfig
from transformers import BertModel

from fedlpp_hf import export_base, load_base
from fedlpp_hf.base.full_model import FullModel
from fedlpp_hf.processes.sentence_models import copy_configs, list_module_configs, load_sentence_model
from fedlpp_hf.trainer.publishing import MERGED_DIR
from tests.helpers import make_args, make_tokenizer
from tests.trainer.cases import CONFIGS, find_trainer, make_rows


sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
LORA = {"r": 4, "target_modules": ["query", "value"]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder, alone and with pooling around it."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    BertModel(CONFIGS["Bert"]).save_pretrained(folder / "encoder")
    make_tokenizer().save_pretrained(folder / "encoder")
    modules = [Transformer(str(folder / "encoder")), Pooling(32, pooling_mode="max")]
    sentence_transformers.SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"))
    return folder


def make_sentence_trainer(model, output_dir, **arguments):
    config_class, trainer_class = find_trainer("SentenceTransformerTrainer")
    options = {"num_clients": 2, "partition": "iid", "num_rounds": 1, "bf16": False}
    model = model if isinstance(model, torch.nn.Module) else str(model)
    return trainer_class(
        model, make_args(output_dir, config_class, **options), train_dataset=make_rows("pairs", 0),
        peft_config=LoraConfig(**LORA), **arguments,
    )  # fmt: skip


@pytest.mark.slow
def test_pooling_and_evaluators_come_along(encoder, tmp_path):
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    rows = make_rows("pairs", 1)
    evaluator = EmbeddingSimilarityEvaluator(rows["anchor"], rows["positive"], [row / 16 for row in range(16)])
    loss = functools.partial(MultipleNegativesRankingLoss, scale=10.0)
    trainer = make_sentence_trainer(encoder / "model", tmp_path, loss=loss, evaluator=evaluator)
    trainer.train()
    assert trainer.model[1].pooling_mode == "max"
    metrics = trainer.server.store.records()[-1]["metrics"]
    assert {"eval_pearson_cosine", "eval_spearman_cosine"} <= metrics["server"].keys() & metrics["proxy"].keys()
    merged = sentence_transformers.SentenceTransformer(str(tmp_path / MERGED_DIR), device="cpu")
    assert merged[1].pooling_mode == "max" and merged.encode(["w3 w4"]).shape == (1, 32)
    trainer.owner.close()


def test_the_base_has_what_describes_the_modules(encoder, tmp_path):
    export_base(encoder / "model", tmp_path / "base")
    with pytest.raises(ValueError, match="has no `1_Pooling/config.json`"):
        load_sentence_model(
            find_trainer("SentenceTransformerTrainer")[1], str(tmp_path / "base"), torch.nn.Linear(1, 1)
        )
    copy_configs(list_module_configs(FullModel(encoder / "model")), tmp_path / "base")
    _, trainer_class = find_trainer("SentenceTransformerTrainer")
    model = load_sentence_model(trainer_class, str(tmp_path / "base"), load_base(tmp_path / "base"))
    assert model[1].pooling_mode == "max" and model.encode(["w3 w4"]).shape == (1, 32)


def test_modules_with_weights(encoder, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    modules = [Transformer(str(encoder / "encoder")), Pooling(32), Dense(32, 16)]
    sentence_transformers.SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="weights outside its transformer .*2_Dense/model.safetensors"):
        list_module_configs(FullModel(tmp_path))


@pytest.mark.parametrize(
    "module",
    [{"type": "os.system", "path": ""}, {"type": "sentence_transformers.models.Pooling", "path": "../elsewhere"}],
)
def test_modules_of_others_and_elsewhere(encoder, tmp_path, module):
    export_base(encoder / "model", tmp_path / "base")
    (tmp_path / "base" / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(ValueError, match="expected a module of sentence-transformers in a folder below"):
        load_sentence_model(
            find_trainer("SentenceTransformerTrainer")[1], str(tmp_path / "base"), torch.nn.Linear(1, 1)
        )


def test_losses_that_can_not_be(encoder, tmp_path):
    from sentence_transformers.losses import MultipleNegativesRankingLoss, SoftmaxLoss

    export_base(encoder / "encoder", tmp_path / "base")
    model = sentence_transformers.SentenceTransformer(str(encoder / "model"), device="cpu")
    with pytest.raises(ValueError, match="Pass the class, loss=MultipleNegativesRankingLoss, or functools.partial"):
        make_sentence_trainer(tmp_path / "base", tmp_path / "out", loss=MultipleNegativesRankingLoss(model))
    with pytest.raises(ValueError, match="SoftmaxLoss has weights .*trained beside the adapter"):
        make_sentence_trainer(tmp_path / "base", tmp_path / "out", loss=lambda model: SoftmaxLoss(model, 32, 2))
