# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The trackers themselves: what they write down of a federation, where it goes on after a resumption, and what is not there.

W&B (offline) and MLflow (in a file) are in no extra; their tests run where they are installed.
"""

import json
import sqlite3
from pathlib import Path

import pytest

from fedlpp_hf import load_base
from tests.helpers import make_rows, make_trainer


GROUPS = {"bytes", "clients", "proxy", "time"}


def run(base, output_dir, lora, tracker, num_rounds, resume=False, **options):
    """Rounds of a federation whose owner has secrets in its options."""
    trainer = make_trainer(
        load_base(base), output_dir, lora, eval_dataset=make_rows(4), num_rounds=num_rounds, max_steps=1, report_to=[tracker],
        hub_token="hf_secrettoken", **options,
    )  # fmt: skip
    trainer.args.full_model = str(output_dir.parent / "secret-model")
    trainer.train(resume_from_checkpoint=resume)


def find_secrets(directory: Path, *secrets: str) -> list[tuple[str, str]]:
    """Files below `directory`, or it itself, that hold one of `secrets`."""
    files = [path for path in (directory, *directory.rglob("*")) if path.is_file()]
    return [(path.name, secret) for path in files for secret in secrets if secret.encode() in path.read_bytes()]


def secrets_of(tmp_path, base):
    return "secrettoken", "secret-model", str(tmp_path), str(base)


def test_tensorboard_has_one_run_in_groups_and_resumes_it(llama_base, lora, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra [trackers]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output_dir = tmp_path / "out"
    run(llama_base, output_dir, lora, "tensorboard", 1)
    run(llama_base, output_dir, lora, "tensorboard", 3, resume=True)
    (directory,) = (output_dir / "runs").iterdir()
    assert directory.name.startswith("out-") and len(list(directory.iterdir())) == 2
    events = EventAccumulator(str(directory)).Reload()
    names = events.Tags()["scalars"]
    assert {name.partition("/")[0] for name in names} == GROUPS
    assert [event.step for event in events.Scalars("proxy/eval_loss")] == [0, 1, 2, 3]
    assert [event.step for event in events.Scalars("bytes/up")] == [1, 2, 3]
    assert find_secrets(directory, *secrets_of(tmp_path, llama_base)) == []
    run(llama_base, output_dir, lora, "tensorboard", 1, overwrite=True)
    assert len(list((output_dir / "runs").iterdir())) == 2  # another federation is another run


def test_trackio_has_one_run_in_groups_and_resumes_it(llama_base, lora, tmp_path):
    trackio = pytest.importorskip("trackio", reason="needs the extra [trackers]")
    directory = Path(trackio.utils.TRACKIO_DIR)
    project = f"project-{tmp_path.name}"
    for rounds, resume in ((1, False), (3, True)):
        run(llama_base, tmp_path / "out", lora, "trackio", rounds, resume, project=project)
    database = next(directory.rglob(f"{project}*.db"))
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    metrics = [(name, step, json.loads(values)) for name, step, values in rows]
    assert {name[:4] for name, _, _ in metrics} == {"out-"} and len({name for name, _, _ in metrics}) == 1
    assert [step for _, step, _ in metrics] == [0, 1, 2, 3]
    assert [values["train/global_step"] for _, _, values in metrics] == [0, 1, 2, 3]
    assert {name.partition("/")[0] for _, _, values in metrics for name in values} == {*GROUPS, "train"}
    assert find_secrets(database.parent, *secrets_of(tmp_path, llama_base)) == []


@pytest.mark.slow
def test_wandb_is_one_run_without_paths_or_commands(llama_base, lora, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb-dir"))
    monkeypatch.setattr("sys.argv", ["/secret-script/train.py", "--hub_token", "hf_secrettoken"])
    (tmp_path / "wandb-dir").mkdir()
    for rounds, resume in ((1, False), (2, True)):
        run(llama_base, tmp_path / "out", lora, "wandb", rounds, resume)
        wandb.finish()  # Transformers leaves that to the end of the process
    runs = sorted((tmp_path / "wandb-dir").glob("wandb/offline-run-*"))
    assert (
        len({directory.name.rpartition("-")[2] for directory in runs}) == 1
    )  # the id: `wandb sync` makes one run of them
    for directory in runs:  # beside it is `logs`, which stays on this machine
        uploaded = [directory / "files", *directory.glob("*.wandb")]
        secrets = (*secrets_of(tmp_path, llama_base), "secret-script", "commit")
        assert [(path.name, secret) for path in uploaded for secret in find_secrets(path, *secrets)] == []
    assert any(b"proxy/eval_loss" in path.read_bytes() for directory in runs for path in directory.glob("*.wandb"))


@pytest.mark.slow
def test_mlflow_has_rounds_for_steps_and_no_paths(llama_base, lora, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setattr("sys.argv", ["/secret-script/train.py"])
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    for rounds, resume in ((1, False), (2, True)):
        run(llama_base, tmp_path / "out", lora, "mlflow", rounds, resume)
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments()
    runs = client.search_runs([experiment.experiment_id])
    names = {entry.info.run_name for entry in runs}
    assert len(names) == 1 and next(iter(names)).startswith("out-")
    steps = [m.step for entry in runs for m in client.get_metric_history(entry.info.run_id, "proxy/eval_loss")]
    assert sorted(steps) == [0, 1, 2]
    text = repr([(entry.data.params, entry.data.tags, entry.data.metrics) for entry in runs])
    for secret in (*secrets_of(tmp_path, llama_base), "secret-script"):
        assert secret not in text
