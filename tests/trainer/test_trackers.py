# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What trackers are shown: rounds, and nothing of the owner's."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from fedlpp_hf import FederatedConfig, FederatedTrainer, load_base
from fedlpp_hf.trainer.trackers import TrackedModel, hide_owner
from tests.helpers import make_args, make_rows, make_trainer


class FakeTracker(TensorBoardCallback):
    """One of Transformers' trackers, as far as `isinstance` goes, which writes down what it is given."""

    def __init__(self):
        self.seen, self.logs = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen += [args.to_json_string(), json.dumps(args.to_sanitized_dict()), model.config.to_json_string()]
        self.seen.append(repr({name: config.to_dict() for name, config in model.peft_config.items()}))
        self.seen.append(repr({name: value for name, value in kwargs.items() if value is not None}))
        self.private, self.output_dir = args.hub_private_repo, args.output_dir

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(args.to_json_string())
        self.logs.append((state.global_step, logs))

    def on_train_end(self, *args, **kwargs):
        self.logs.append("end")


@pytest.mark.parametrize("how", ["report_to", "callbacks"])
def test_trackers_see_no_path_of_the_owners(llama_base, full_llama, lora, tmp_path, monkeypatch, how):
    tracker = FakeTracker()
    if how == "report_to":
        monkeypatch.setattr(
            "fedlpp_hf.trainer.federated.get_reporting_integration_callbacks", lambda names: [lambda: tracker]
        )
    args = make_args(tmp_path / "secret" / "run", max_steps=1, run_name="first")
    trainer = FederatedTrainer(
        load_base(llama_base), args, train_dataset=make_rows(), eval_dataset=make_rows(), peft_config=lora,
        callbacks=[tracker] if how == "callbacks" else None,
    )  # fmt: skip
    trainer.args.full_model = str(full_llama)
    trainer.train()
    assert [log[0] for log in tracker.logs[:-1]] == [0, 1, 2] and tracker.logs[-1] == "end"
    text = "\n".join(tracker.seen)
    for path in (tmp_path, llama_base, full_llama):
        assert str(path) not in text
    assert '"output_dir": "run"' in text and '"full_model": "<FULL_MODEL>"' in text and '"run_name": "first"' in text
    assert tracker.private is True and tracker.output_dir == args.output_dir
    trainer.evaluate()
    assert len(tracker.logs) == (4 if how == "report_to" else 5)  # as of any Trainer, callbacks hear of it
    assert str(tmp_path) not in "\n".join(tracker.seen)


def test_visibility_is_the_users_choice(tmp_path):
    for private, expected in ((None, True), (True, True), (False, False)):
        args = FederatedConfig(str(tmp_path), use_cpu=True, hub_private_repo=private)
        shown = hide_owner(args)
        assert shown.hub_private_repo is expected and args.hub_private_repo is private
        assert isinstance(shown, FederatedConfig) and args.to_dict()["output_dir"] == str(tmp_path)


class Trackio(ModuleType):
    """As much of trackio as Transformers calls."""

    __version__ = "0.21.1"

    def __init__(self):
        super().__init__("trackio")
        self.runs, self.values, self.logs = [], {}, []
        nothing = SimpleNamespace(get=lambda: None)
        self.context_vars = SimpleNamespace(current_space_id=nothing, current_project=nothing)
        self.finish = lambda: self.logs.append("end")

    def init(self, **options):
        self.runs.append(options)

    def log(self, values):
        self.logs.append(values)


@pytest.mark.parametrize("private", [None, False])
def test_trackio_is_private_unless_the_user_says_otherwise(llama_base, lora, tmp_path, monkeypatch, private):
    trackio = Trackio()
    trackio.config = type("Config", (dict,), {"update": lambda self, values, **_: trackio.values.update(values)})()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: True)
    trainer = make_trainer(
        load_base(llama_base), tmp_path / "out", lora, max_steps=1, report_to=["trackio"], hub_private_repo=private
    )
    trainer.train()
    assert [run["private"] for run in trackio.runs] == [private is None]
    assert len(trackio.logs) == 4 and trackio.logs[-1] == "end"
    assert str(tmp_path) not in repr(trackio.values) and trackio.values["num_rounds"] == 2


def test_relative_paths_are_hidden_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "full").mkdir(parents=True)
    args = FederatedConfig("runs/out", use_cpu=True, full_model="models/full", deepspeed=None)
    args.accelerator_config.mixed = {"file": str(tmp_path / "a.yaml"), "files": [tmp_path / "b.yaml"]}
    args.resume_from_checkpoint = "models/full"
    args.run_name = "either/or"
    values = hide_owner(args).to_dict()
    assert (values["output_dir"], values["full_model"], values["resume_from_checkpoint"]) == (
        "out",
        "<FULL_MODEL>",
        "full",
    )
    assert values["run_name"] == "either/or"


def test_model_that_trackers_see_has_no_weights(full_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(full_llama)
    seen = TrackedModel(model)
    assert seen.num_parameters() == model.num_parameters() and seen.parameters() == []
    assert seen.config._name_or_path == "" and model.config._name_or_path == str(full_llama)
    assert not [name for name, value in vars(seen).items() if hasattr(value, "state_dict")]


@pytest.mark.parametrize(
    "name, variable",
    [("wandb", "WANDB_LOG_MODEL"), ("comet_ml", "COMET_LOG_ASSETS"), ("dvclive", "HF_DVCLIVE_LOG_MODEL")],
)
def test_trackers_that_would_upload_the_base_are_refused(llama_base, lora, tmp_path, monkeypatch, name, variable):
    tracker = INTEGRATION_TO_CALLBACK[name]
    monkeypatch.setattr(tracker, "__init__", lambda self: None)
    monkeypatch.setenv(variable, "true")
    trainer = FederatedTrainer(
        load_base(llama_base), make_args(tmp_path), train_dataset=make_rows(), peft_config=lora, callbacks=[tracker()]
    )
    with pytest.raises(ValueError, match=f"{variable}=true: {tracker.__name__} would upload the federation's files"):
        trainer.train()
