# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The app that Flower sends around is two lines that import the installed library. Clients run no other one.

Flower 1.41 has `--trusted-entities` for that: signatures of its own hub, which a SuperLink of one's own does not hand on for an
app from disk. And a signature says who made an app; here it is known what it is.
"""

import ast
import hashlib
import io
import zipfile
from typing import Any


# What `flwr run` sends; `recipes/flower` has the same app for users' own SuperLinks.
APP_FILES = {
    "pyproject.toml": """\
[project]
name = "fedlpp-hf-app"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedlpp-hf"

[tool.flwr.app.components]
serverapp = "fedlpp_app:server_app"
clientapp = "fedlpp_app:client_app"
""",
    "fedlpp_app.py": """\
from fedlpp_hf.flower.client_app import make_client_app
from fedlpp_hf.flower.server_app import make_server_app


server_app = make_server_app()
client_app = make_client_app()
""",
}
_LIST = ".info/CONTENT"  # Flower's list of the files in an app
_MAX_BYTES = 100_000


class ForeignAppError(ValueError):
    """The server sent another app."""


def check_run(run: Any) -> None:
    """Check that a run, as Flower describes it, is of the app's name: Flower finds the files of an app by it.

    Raises:
        ForeignAppError: if it is not.
    """
    project = _read_project(APP_FILES["pyproject.toml"])
    expected = (f"{project['flwr']['app']['publisher']}/{project['name']}", project["version"])
    if (run.fab_id, run.fab_version) != expected or run.primary_task_type != "flwr-serverapp":
        raise ForeignAppError(
            f"the run is of {run.fab_id!r:.80}, version {run.fab_version!r:.20}; expected {expected}"
        )


def check_app(content: bytes, *digests: str) -> None:
    """Check that a packed app is [`APP_FILES`], but for comments and what tells of the app.

    Args:
        content: of the packed app.
        digests: under which Flower keeps it, and looks it up.

    Raises:
        ForeignAppError: if it is not.
    """
    if {hashlib.sha256(content).hexdigest()} != set(digests):
        raise ForeignAppError("its digest is another app's")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sorted(archive.namelist()) != sorted([_LIST, *APP_FILES]):
                raise ForeignAppError(
                    f"it has the files {sorted(archive.namelist())[:5]}; expected {sorted(APP_FILES)}"
                )
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
                raise ForeignAppError(f"it is larger than {_MAX_BYTES} bytes")
            found = {name: archive.read(name).decode() for name in APP_FILES}
        if _read_project(found["pyproject.toml"]) != _read_project(APP_FILES["pyproject.toml"]):
            raise ForeignAppError("its pyproject.toml names other code")
        if _read_code(found["fedlpp_app.py"]) != _read_code(APP_FILES["fedlpp_app.py"]):
            raise ForeignAppError("its fedlpp_app.py has other code")
    except ForeignAppError:
        raise
    except Exception as error:  # of zipfile, tomllib or ast, on bytes from elsewhere
        raise ForeignAppError(f"it can't be read ({type(error).__name__})") from error


def _read_project(text: str) -> dict[str, Any]:
    """What of a pyproject.toml decides what runs, and under which name it is kept."""
    import tomllib  # type: ignore[import-not-found, unused-ignore]  # of Python 3.11, which Flower needs

    project = tomllib.loads(text)
    names = {name: project["project"].get(name) for name in ("name", "version", "dependencies")}
    return names | {"flwr": project["tool"]["flwr"]}


def _read_code(text: str) -> str:
    module = ast.parse(text)
    if module.body and isinstance(module.body[0], ast.Expr) and isinstance(module.body[0].value, ast.Constant):
        del module.body[0]  # a docstring
    return ast.dump(module)
