# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients run no app but the installed one, whatever the server sends."""

import hashlib
import io
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest


pytest.importorskip("flwr", reason="flwr is not installed: needs the extra `flower`")

from flwr.cli.build import build_fab_from_disk, build_fab_from_files

from fedlpp_hf.flower.environment import make_environment
from fedlpp_hf.flower.installed_app import APP_FILES, ForeignAppError, check_app, check_run
from fedlpp_hf.flower.process_group import run_group
from fedlpp_hf.flower.server_command import wait_for_port
from fedlpp_hf.flower.superlink_control import write_app


RECIPE = Path(__file__).parents[2] / "recipes" / "flower"
PROJECT, CODE = APP_FILES.values()


def build(files):
    return build_fab_from_files({name: text.encode() for name, text in files.items()})[0]


def check(content):
    check_app(content, hashlib.sha256(content).hexdigest())


def pack(entries):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return stream.getvalue()


def test_installed_app_and_the_recipes_pass(tmp_path):
    check(build(APP_FILES))
    for name in APP_FILES:
        (tmp_path / name).write_text((RECIPE / name).read_text())
    check(build_fab_from_disk(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"fedlpp_app.py": CODE + "import os\n"}, "other code"),
        ({"fedlpp_app.py": CODE.replace("make_client_app()", "print")}, "other code"),
        ({"fedlpp_app.py": '"""x"""\n' + CODE, "other.py": ""}, "it has the files"),
        ({"pyproject.toml": PROJECT.replace("fedlpp_app:client_app", "os:system")}, "names other code"),
        ({"pyproject.toml": PROJECT.replace("dependencies = []", 'dependencies = ["evil"]')}, "names other code"),
        ({"pyproject.toml": PROJECT.replace('"fedlpp-hf"', '"else"')}, "names other code"),
    ],
)
def test_other_apps_are_refused(files, message):
    with pytest.raises(ForeignAppError, match=message):
        check(build(APP_FILES | files))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_no_app_is_refused():
    good = [(".info/CONTENT", ""), *APP_FILES.items()]
    for content, message in (
        (b"", "can't be read"),
        (b"PK", "can't be read"),
        (pack(good)[:-40], "can't be read"),
        (pack([*good, ("fedlpp_app.py", "import os")]), "it has the files"),
        (pack([(".info/CONTENT", "x" * 200_000), *APP_FILES.items()]), "larger than"),
        (pack([*good[:2], ("fedlpp_app.py", "(" * 90_000)]), "can't be read"),
    ):
        with pytest.raises(ForeignAppError, match=message):
            check(content)
    with pytest.raises(ForeignAppError, match="digest"):
        check_app(build(APP_FILES), "ab" * 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"fab_id": "fedlpp-hf/else"},
        {"fab_version": "1/../../../../tmp/x"},
        {"primary_task_type": "flwr-agentapp"},
    ],
)
def test_run_of_another_name_is_refused(changes):
    run = {"fab_id": "fedlpp-hf/fedlpp-hf-app", "fab_version": "0.1.0", "primary_task_type": "flwr-serverapp"}
    check_run(SimpleNamespace(**run))
    with pytest.raises(ForeignAppError, match="the run is of"):
        check_run(SimpleNamespace(**run | changes))


FOREIGN = """\
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server_app = ServerApp()
client_app = ClientApp()


@client_app.query("describe")
def describe(message, context):
    Path({seen!r}).touch()
    return Message(RecordDict(), reply_to=message)


@server_app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        pass
    message = Message(RecordDict(), message_type="query.describe", dst_node_id=nodes[0])
    [answer] = grid.send_and_receive([message], timeout=100)
    Path({answered!r}).write_text(str(answer.error) if answer.has_error() else "done")
"""


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("node", ["flwr.supernode.cli.flower_supernode", "fedlpp_hf.flower.supernode"])
def test_compromised_server_ships_no_code(tmp_path, node):
    """Live: the SuperLink runs another app of the same name. Flower's own SuperNode executes it, ours does not."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, local = one.getsockname()[1], other.getsockname()[1]
    seen, answered = tmp_path / "seen", tmp_path / "answered"
    (tmp_path / "server").mkdir()
    write_app(tmp_path / "server", {"address": f"127.0.0.1:{port}", "insecure": True}, "none.yaml", [], None)
    (tmp_path / "server" / "app" / "fedlpp_app.py").write_text(FOREIGN.format(seen=str(seen), answered=str(answered)))
    (tmp_path / "client").mkdir()
    servers, clients = make_environment(tmp_path / "server"), make_environment(tmp_path / "client")
    link = [
        sys.executable,
        "-m",
        "fedlpp_hf.flower.superlink",
        "--insecure",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    link += ["--database", str(tmp_path / "db"), "--disable-runtime-dependency-installation"]
    start = [sys.executable, "-m", node]
    if node.startswith("flwr"):
        code = "from flwr.supernode.cli import flower_supernode; flower_supernode()  # flower-supernode, to be ended by its name"
        start = [sys.executable, "-c", code]
    start += ["--insecure", "--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1", "--port", str(local)]
    log = tmp_path / "node.log"
    with (
        run_group(link, servers, tmp_path / "link.log", tmp_path / "superlink.pid") as superlink,
        run_group(start, clients, log, tmp_path / "supernode.pid"),
    ):
        wait_for_port(port, superlink, tmp_path / "link.log")
        run = ["flwr", "run", str(tmp_path / "server" / "app"), "fedlpp"]
        subprocess.run(run, env=servers, check=True, stdin=subprocess.DEVNULL, timeout=120)
        deadline = time.monotonic() + 150
        while not (answered.exists() and answered.read_text()) and time.monotonic() < deadline:
            time.sleep(0.5)
    assert answered.exists(), (tmp_path / "link.log").read_text()[-3000:] + log.read_text()[-3000:]
    if node.startswith("flwr"):
        assert seen.exists() and answered.read_text() == "done"  # so the attack is one
    else:
        assert not seen.exists() and "could not be verified" in answered.read_text()
        assert (
            "The server sent an app that is not the installed one: its fedlpp_app.py has other code" in log.read_text()
        )
