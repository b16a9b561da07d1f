# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Running notebooks, and keeping their outputs: `python -m tests.notebooks.execute` refreshes those in notebooks/."""

import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.helpers import ROOT


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a kept output must not have: a path of the machine it ran on, or a time.
UNWANTED = re.compile(
    r"(?<![\w.])/(?:home|root|tmp|usr|var|opt|mnt|Users|work)\b|[A-Z]:\\|\d ?(?:ms|s|min)\b|it/s|\d{4}-\d\d-\d\d"
)


def execute(path: Path, directory: Path) -> nbformat.NotebookNode:
    """Run a notebook from top to bottom in `directory`, and return it with what is worth keeping of its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(directory)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = join_streams([output for output in cell.outputs if keep(output)])
    return notebook


def keep(output: nbformat.NotebookNode) -> bool:
    """Whether an output is the cell's result: warnings, progress and log lines go."""
    return output.output_type in ("execute_result", "display_data") or output.get("name") == "stdout"


def join_streams(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Prints that follow each other as one output: where they are cut depends on the machine's speed."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def read_text(output: nbformat.NotebookNode) -> str:
    """All text of an output."""
    data = output.get("data", {})
    return "\n".join([output.get("text", ""), *(str(value) for key, value in data.items() if key.startswith("text/"))])


def main() -> None:
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as directory:
            nbformat.write(execute(path, Path(directory)), path)


if __name__ == "__main__":
    main()
