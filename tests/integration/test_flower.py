# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation over Flower ends in the bits of one in process, whatever happens to its machines on the way."""

import ast
import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fedlpp_hf import RoundStore
from fedlpp_hf.adapters import read_adapter
from fedlpp_hf.base_transfer import PackedBase
from fedlpp_hf.client import ClientSettings, make_client_trainer
from fedlpp_hf.messages import ClientFailure
from fedlpp_hf.remote import RemoteConfig, load_rows, load_trainer

from ..conftest import make_rows
from ..test_trainer import assert_equal


pytest.importorskip("flwr", reason="flwr is not installed: pip install fedlpp_hf[flower]")

from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlpp_hf.certificates import make_certificates, make_node_key
from fedlpp_hf.deployment import run_client, run_server
from fedlpp_hf.flower import DESCRIBE, TRAIN, FlowerClients, make_client_app


pytestmark = pytest.mark.integration
TASK = Path(__file__).with_name("flower_task.py")
CLIENTS = [f"site-{number}" for number in range(3)]
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

    monkeypatch.setattr("fedlpp_hf.flower.make_client_trainer", find_or_make)


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


def run_in_process(config, rows, output_dir, failures=()):
    """The federation of `config` with all clients in this process; `failures` are (round, client)."""
    datasets = {client: load_rows(rows / f"{client}.jsonl") for client in CLIENTS}
    trainer, _ = load_trainer(config, ["--output_dir", str(output_dir)], model=None, train_dataset=datasets)

    def train(tasks):
        for task in tasks:
            failed = (task.round, task.client_id) in failures
            yield ClientFailure(task.client_id, "as planned") if failed else trainer.train_client(task)

    trainer.train_remotely(train, {client: len(dataset) for client, dataset in datasets.items()})
    return read_adapter(output_dir)[0]


class Network:
    """A Grid without processes: its nodes answer through the real ClientApp when they are asked.

    `fault` is called with the client and each message to it; it may return "silent", "offline", or bytes in place of the
    update.
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

    def get_nodes(self):
        return [SimpleNamespace(node_id=n, last_activated_at="now") for n in self.nodes if n not in self.offline]

    def push_messages(self, messages):
        (message,) = messages
        node = message.metadata.dst_node_id
        identity = message.metadata.__dict__["_message_id"] = message.object_id
        self.asked.append((message.metadata.message_type, self.nodes[node]))
        fault = self.fault(self.nodes[node], message)
        if fault == "offline":
            self.offline.add(node)
        if fault is None or isinstance(fault, bytes):
            context = Context(1, node, {"settings": str(self.settings[node].write())}, RecordDict(), {})
            reply = self.app(message, context)
            if fault is not None:
                reply.content["fedlpp_hf"]["update"] = fault
            self.replies[identity] = reply
        return [identity]

    def pull_messages(self, identities):
        return [self.replies.pop(identity) for identity in identities if identity in self.replies]


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
        monkeypatch.setattr("fedlpp_hf.flower.__version__", "0.0.1")
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
    from fedlpp_hf.superlink import FleetOnly

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


class TestDeployment:
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

        from fedlpp_hf.deployment import _APP

        recipe = Path(__file__).parents[2] / "recipes" / "flower"
        started, by_hand = (
            tomllib.loads(text) for text in (_APP["pyproject.toml"], (recipe / "pyproject.toml").read_text())
        )
        assert started["tool"]["flwr"] == by_hand["tool"]["flwr"]
        assert "config" not in started["tool"]["flwr"]["app"]  # it would go to every client
        assert ast.dump(ast.parse(_APP["fedlpp_app.py"]).body[0]) in ast.dump(
            ast.parse((recipe / "fedlpp_app.py").read_text())
        )


class Machines:
    """Server and clients as users start them, each in processes of its own."""

    def __init__(self, directory, config, rows, full_model, port):
        self.directory, self.config, self.rows, self.full_model, self.port = directory, config, rows, full_model, port
        self.processes = []

    def start(self, side, *arguments):
        # Without the launcher's own directory in front, a checkout that is not installed would not be found.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [sys.executable, "-m", "fedlpp_hf.cli", side, "--config", str(self.config), *arguments]
        with open(self.directory / f"{side}-{len(self.processes)}.log", "wb") as log:
            process = subprocess.Popen(command, cwd=self.directory, env=environment, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_server(self, *flags):
        options = ["--state_dir", "server", "--client_keys", "keys", "--port", str(self.port)]
        return self.start("server", *options, "--output_dir", "out", "--full_model", str(self.full_model), *flags)

    def start_client(self, client):
        options = [
            "--state_dir",
            client,
            "--cache_dir",
            f"cache-{client}",
            "--data",
            str(self.rows / f"{client}.jsonl"),
        ]
        options += ["--server", f"127.0.0.1:{self.port}", "--certificate", "server/ca.crt"]
        return self.start("client", *options)

    def wait_for_round(self, number, server):
        mark = self.directory / f"out/_federation/rounds/round-{number:05d}/round.json"
        while not mark.exists():
            assert server.poll() is None, "the server ended early"
            time.sleep(0.05)

    def stop(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(timeout=60)


@pytest.fixture
def machines(tmp_path, write_config, rows, full_llama):
    config = write_config(base=None, lost_timeout=5, round_timeout=200, join_timeout=250, min_clients=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machines = Machines(tmp_path, config, rows, full_llama, port)
    make_certificates(tmp_path / "server", ["127.0.0.1", "localhost"])
    (tmp_path / "keys").mkdir()
    for client in CLIENTS:
        make_node_key(tmp_path / client)
        shutil.copy(tmp_path / client / "node.pub", tmp_path / "keys" / f"{client}.pub")
    yield machines
    machines.stop()


@pytest.mark.timeout(900)
def test_machines_that_die(machines, tmp_path, write_config, rows, llama_base):
    """TLS, node keys, warm trainers. In round 1 a trainer is killed, in round 2 a client is; after round 2 the server is,
    in the middle of the next round. What it resumes to is what one process computes without that client. A fourth machine
    has a key of its own making, and no part in any of it."""
    make_node_key(tmp_path / "intruder")
    shutil.copy(rows / "site-0.jsonl", rows / "intruder.jsonl")
    server = machines.start_server()
    intruder = machines.start_client("intruder")
    clients = [machines.start_client(client) for client in CLIENTS]
    machines.wait_for_round(0, server)
    os.kill(int((tmp_path / "site-0" / "trainer.pid").read_text()), signal.SIGKILL)
    machines.wait_for_round(1, server)
    clients[2].terminate()
    machines.wait_for_round(2, server)
    server.kill()
    os.kill(int((tmp_path / "server" / "server.pid").read_text()), signal.SIGKILL)
    assert machines.start_server("--resume_from_checkpoint", "true").wait() == 0

    records = RoundStore(tmp_path / "out").records()
    assert [sorted(record["rejected"]) for record in records] == [[], [], ["site-2"], ["site-2"]]
    failures = [(2, "site-2"), (3, "site-2")]
    reference = run_in_process(write_config(min_clients=2), rows, tmp_path / "process", failures)
    assert_equal(read_adapter(tmp_path / "out")[0], reference)
    assert (tmp_path / "out" / "_merged" / "model.safetensors").is_file()
    assert clients[0].poll() is clients[1].poll() is None
    assert sorted(RoundStore(tmp_path / "out").read()["clients"]) == CLIENTS
    assert intruder.poll() is None  # it tries again and again, and was sent nothing
    assert "SuperNode ended with code" in (tmp_path / "client-1.log").read_text()
    assert not any((tmp_path / "cache-intruder").glob("*"))
