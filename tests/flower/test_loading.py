# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Trainer and rows from a configuration."""

import pytest

from fedlpp_hf.flower.loading import load_function, load_rows, load_trainer
from tests.helpers import make_rows


class TestLoading:
    def test_reference_to_a_function(self, tmp_path):
        (tmp_path / "task_of_test.py").write_text("def make():\n    return 1\n")
        assert load_function("task_of_test.py:make", tmp_path)() == 1
        with pytest.raises(ValueError, match="has no `other`"):
            load_function("task_of_test.py:other", tmp_path)
        with pytest.raises(ValueError, match=r"expected FILE\.py:FUNCTION"):
            load_function("nothing.py:make", tmp_path)

    def test_function_without_types(self, tmp_path):
        (tmp_path / "untyped_task.py").write_text("def make(task, args, model, train_dataset):\n    pass\n")
        (tmp_path / "fed.yaml").write_text("trainer: untyped_task.py:make\n")
        with pytest.raises(ValueError, match="declare the types"):
            load_trainer(tmp_path / "fed.yaml", [], model="base", train_dataset={})

    def test_rows(self, tmp_path):
        rows = make_rows(4)
        rows.to_json(tmp_path / "rows.jsonl")
        rows.to_parquet(tmp_path / "rows.parquet")
        rows.save_to_disk(tmp_path / "rows")
        for name in ("rows.jsonl", "rows.parquet", "rows"):
            assert load_rows(tmp_path / name)["input_ids"] == rows["input_ids"]
        with pytest.raises(ValueError, match=r"rows\.txt"):
            load_rows(tmp_path / "rows.txt")
