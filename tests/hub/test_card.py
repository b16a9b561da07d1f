# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Model cards: metadata as the Hub reads them, and lines that load the model with the class that it is of."""

import json
import re

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig

from fedlpp_hf.hub.card import read_source_card, write_model_card
from fedlpp_hf.hub.metadata import read_metadata
from fedlpp_hf.hub.snippet import describe_loading
from fedlpp_hf.merge.merge import merge_adapter
from tests.helpers import save_adapter


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def _write_card(directory, metadata: str):
    directory.mkdir(exist_ok=True)
    (directory / "README.md").write_text(f"---\n{metadata}\n---\n# Words\n", encoding="utf-8")
    return directory


@pytest.mark.parametrize("language", ["no", "on", "y", "off", "NO", "[no, en]", "\n- nb\n- no", '"no"'])
def test_norwegian_is_a_language(tmp_path, language):
    source = _write_card(tmp_path / "full", f"language: {language}\nlicense: mit")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    save_adapter(_build("LlamaForCausalLM"), LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    expected = yaml.load(language, Loader=yaml.BaseLoader)
    assert read_source_card(source, tmp_path)["language"] == expected
    card = write_model_card(tmp_path / "adapter", "owner/adapter", source=source)
    # Quoted, so that readers of YAML 1.1 read the same.
    for loader in (yaml.BaseLoader, yaml.SafeLoader):
        assert yaml.load(card.read_text().split("---")[1], Loader=loader)["language"] == expected
    assert read_metadata(card)["language"] == expected


def test_what_only_looks_like_a_date_or_number_is_text(tmp_path):
    _write_card(
        tmp_path, "tags: [2024-01-01, 16:9, 1.0, 012, yes, true-story]\nlicense_name: 2.0\nlanguage: null\ngated: true"
    )
    found = read_source_card(None, tmp_path)
    assert found == {"tags": ["2024-01-01", "16:9", "1.0", "012", "yes", "true-story"], "license_name": "2.0"}
    assert read_metadata(tmp_path / "README.md")["gated"] is True


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: mit: really", "not valid YAML: mapping values are not allowed"),
        ("tags: [a, b", "not valid YAML"),
        ("\tlicense: mit", "not valid YAML"),
        ("tags: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("- a\n- b", "a list, not keys with values"),
        ("just words", "a str, not keys with values"),
    ],
)
def test_broken_metadata_are_refused_in_one_line(tmp_path, metadata, message):
    source = _write_card(tmp_path / "full", metadata)
    with pytest.raises(ValueError, match=f"model card of `.*README.md` can't be read: .*{message}") as caught:
        write_model_card(tmp_path, "owner/model", source=source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "# Only words\n", "---\n---\n# No keys\n"])
def test_cards_without_metadata(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert read_source_card(None, tmp_path) == {}


def _build(name: str):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    more = {"image_size": 8, "patch_size": 4} if name.startswith("ViT") else {"vocab_size": 64}
    labels = 2 if name.endswith("QuestionAnswering") else 3
    return model_class(model_class.config_class(num_labels=labels, **_SIZES, **more))


# The model, the task in the adapter's configuration, its target, and the first line that loads it.
ADAPTERS = {
    "causal": ("LlamaForCausalLM", "CAUSAL_LM", "q_proj", 'AutoModelForCausalLM.from_pretrained("org/full")'),
    "classifier": (
        "BertForSequenceClassification", "SEQ_CLS", "query",
        'AutoModelForSequenceClassification.from_pretrained("org/full", num_labels=3)',
    ),
    "two layers in the head": (
        "RobertaForSequenceClassification", "SEQ_CLS", "query",
        'AutoModelForSequenceClassification.from_pretrained("org/full", num_labels=3)',
    ),
    "tokens": (
        "BertForTokenClassification", "TOKEN_CLS", "query",
        'AutoModelForTokenClassification.from_pretrained("org/full", num_labels=3)',
    ),
    "answers": (
        "BertForQuestionAnswering", "QUESTION_ANS", "query", 'AutoModelForQuestionAnswering.from_pretrained("org/full")'
    ),
    "features": ("BertModel", "FEATURE_EXTRACTION", "query", 'AutoModel.from_pretrained("org/full")'),
    "no task": (
        "ViTForImageClassification", None, "q_proj", 'ViTForImageClassification.from_pretrained("org/full", num_labels=3)'
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_is_loaded_with_the_class_of_its_task(tmp_path, monkeypatch, name):
    model_name, task, target, line = ADAPTERS[name]
    model = _build(model_name)
    model.save_pretrained(tmp_path / "full")
    head = {"modules_to_save": ["classifier"]} if hasattr(model, "classifier") else {}
    adapted = save_adapter(model, LoraConfig(target_modules=[target], task_type=task, **head), tmp_path / "adapter")
    monkeypatch.setattr("fedlpp_hf.hub.card.read_source_card", lambda *arguments: {})
    card = write_model_card(tmp_path / "adapter", "owner/adapter", source="org/full").read_text()
    assert line in card and "PeftModel.from_pretrained(model, " in card
    # The lines run, and give the adapted model.
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code = code.replace("org/full", str(tmp_path / "full")).replace("owner/adapter", str(tmp_path / "adapter"))
    found: dict = {}
    exec(code, found)
    inputs = {"pixel_values": torch.ones(1, 3, 8, 8)} if "ViT" in model_name else {"input_ids": torch.arange(9)[None]}
    with torch.inference_mode():
        torch.testing.assert_close(found["model"].eval()(**inputs)[0], adapted(**inputs)[0])


def test_adapter_without_a_task_is_loaded_as_its_federation_trained_it(tmp_path):
    save_adapter(_build("BertForTokenClassification"), LoraConfig(target_modules=["query"]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": None}))
    base = tmp_path / "_federation" / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"architectures": ["BertForTokenClassification"]}')
    assert "model = BertForTokenClassification.from" in describe_loading(tmp_path, "owner/adapter", None, tmp_path)
    _build("BertForSequenceClassification").save_pretrained(tmp_path / "full")
    found = describe_loading(tmp_path, "owner/adapter", tmp_path / "full", None)
    assert 'model = BertForSequenceClassification.from_pretrained("the full model")' in found


def test_merged_model_is_loaded_with_its_class(tmp_path):
    model = _build("BertForSequenceClassification")
    model.save_pretrained(tmp_path / "full")
    save_adapter(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"), tmp_path / "adapter")
    merge_adapter(tmp_path / "full", tmp_path / "adapter", tmp_path / "out")
    card = write_model_card(tmp_path / "out", "owner/merged", source=tmp_path / "full").read_text()
    assert 'BertForSequenceClassification.from_pretrained("owner/merged")' in card
