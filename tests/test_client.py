# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The client's side of a network: the local trainer's socket, the base in pieces, settings and certificates."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from fedlpp_hf.base.export import export_base
from fedlpp_hf.cli import main as cli
from fedlpp_hf.flower import trainer_process as client
from fedlpp_hf.flower import version as flower_version
from fedlpp_hf.flower.base_transfer import PackedBase, count_received, find_base, read_fingerprint, receive_piece
from fedlpp_hf.flower.loading import load_function, load_rows, load_trainer
from fedlpp_hf.flower.trainer_process import ClientSettings, TrainerService, ask_trainer

from .conftest import make_rows


FINGERPRINT = "a" * 64


@pytest.fixture
def settings(tmp_path, monkeypatch, request):
    # A Unix socket's path has at most 107 bytes, and pytest's are longer in a parallel run.
    runtime = tempfile.TemporaryDirectory()
    request.addfinalizer(runtime.cleanup)
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime.name)
    state = tmp_path / "state"
    state.mkdir()
    (state / "trainer.key").touch(0o600)
    (state / "trainer.key").write_bytes(b"k" * 32)
    base = tmp_path / "base"
    base.mkdir()
    (base / "base_manifest.json").write_text(json.dumps({"fingerprint": FINGERPRINT, "full_precision_linears": []}))
    return ClientSettings("config", "data", "site", str(state), str(tmp_path / "cache"))


@pytest.fixture
def base_dir(settings, tmp_path):
    return tmp_path / "base"


@pytest.fixture
def service(settings, monkeypatch):
    """A trainer that answers every task with the task, in a thread instead of a process."""
    trainer = SimpleNamespace(
        client_datasets={"site": range(7)},
        guard=SimpleNamespace(fingerprint=FINGERPRINT),
        _share=lambda *args: None,
    )

    def train(trainer, task):
        if task == b"bad":
            raise ValueError("no task")
        return b"update of " + task

    monkeypatch.setattr(client, "train_task", train)
    thread = threading.Thread(target=TrainerService(settings, trainer).serve)
    thread.start()
    while client._status(settings) is None:
        assert thread.is_alive(), "the service ended before it answered"
        time.sleep(0.01)
    yield
    client.stop_trainer(settings)
    thread.join(timeout=10)
    assert not thread.is_alive() and not settings.socket_file.exists()


class TestTrainerService:
    def test_answers(self, settings, service, base_dir):
        status, _ = ask_trainer(settings, base_dir, "status")
        assert status == {"clients": {"site": 7}, "base": FINGERPRINT, "pid": os.getpid()}
        assert ask_trainer(settings, base_dir, "train", b"task")[1] == b"update of task"

    def test_failure_is_told_and_survived(self, settings, service, base_dir):
        with pytest.raises(RuntimeError, match="ValueError: no task"):
            ask_trainer(settings, base_dir, "train", b"bad")
        assert ask_trainer(settings, base_dir, "train", b"good")[1] == b"update of good"

    def test_hanging_trainer_is_ended(self, settings, service, base_dir, monkeypatch):
        ended, release = [], threading.Event()
        monkeypatch.setattr(client, "train_task", lambda trainer, task: release.wait(30) and b"late")
        monkeypatch.setattr(client.os, "kill", lambda pid, how: ended.append((pid, how)))
        with pytest.raises(RuntimeError, match="did not answer within 0 s"):
            ask_trainer(settings, base_dir, "train", b"task", timeout=0.2)
        release.set()
        assert (os.getpid(), signal.SIGKILL) in ended

    @pytest.mark.parametrize("deaths", [1, 2])
    def test_trainer_that_dies_over_a_task_is_started_once_more(self, deaths, settings, base_dir, monkeypatch):
        starts, answers = [], [EOFError()] * deaths + [({}, b"update")]

        def call(*arguments):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(client, "_call", call)
        monkeypatch.setattr(client, "ensure_trainer", lambda *arguments: starts.append(1))
        settings.log_file.write_text("Killed\n")
        if deaths == 1:
            assert ask_trainer(settings, base_dir, "train", b"task")[1] == b"update"
        else:
            with pytest.raises(RuntimeError, match="died twice over one task.*Killed"):
                ask_trainer(settings, base_dir, "train", b"task")
        assert len(starts) == 2

    def test_socket_is_the_users_alone(self, settings, service):
        assert stat.S_IMODE(settings.socket_file.stat().st_mode) == 0o600
        assert stat.S_IMODE(settings.socket_file.parent.stat().st_mode) == 0o700

    def test_wrong_key_is_refused(self, settings, service):
        settings.key_file.write_bytes(b"x" * 32)
        with pytest.raises((EOFError, OSError)):
            client._call(settings, "status", b"", 5)
        settings.key_file.write_bytes(b"k" * 32)

    def test_garbage_does_not_end_it(self, settings, service, base_dir):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(settings.socket_file))
            connection.sendall(b"\xff" * 1000)
        assert ask_trainer(settings, base_dir, "status")[0]["base"] == FINGERPRINT

    def test_key_that_others_can_read_is_refused(self, settings):
        settings.key_file.chmod(0o644)
        with pytest.raises(RuntimeError, match="can be read by others"):
            TrainerService(settings, None)

    def test_shared_runtime_directory_is_refused(self, settings, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        (tmp_path / f"fedlpp-{os.getuid()}").mkdir()
        (tmp_path / f"fedlpp-{os.getuid()}").chmod(0o755)
        with pytest.raises(RuntimeError, match="this user alone"):
            _ = settings.socket_file

    def test_ends_with_its_parent(self, settings, monkeypatch):
        monkeypatch.setattr(client, "_is_alive", lambda pid: False)
        TrainerService(settings, SimpleNamespace(_share=lambda *args: None)).serve()
        assert not settings.socket_file.exists()

    def test_trainer_that_does_not_start_tells_why(self, settings, base_dir):
        settings = replace(settings, launch=[sys.executable, "-c", "raise SystemExit('no room')"])
        with pytest.raises(RuntimeError, match=r"did not start.*no room"):
            ask_trainer(settings, base_dir, "status")


class TestTrainerProcess:
    """The same as a process, which nobody but `ask_trainer` starts; what it holds is a stub, so that it starts at once."""

    SCRIPT = """
import sys, time
from types import SimpleNamespace
from fedlpp_hf.flower import trainer_process as client

def train(trainer, task):
    time.sleep(60 if task == b"long" else 0)
    return task

_, _, module, settings, base = sys.argv
client.train_task = train
fingerprint = client.read_fingerprint(base)
trainer = SimpleNamespace(
    client_datasets={"site": range(7)}, guard=SimpleNamespace(fingerprint=fingerprint), _share=lambda *args: None
)
client.TrainerService(client.ClientSettings.read(settings), trainer).serve()
"""

    @pytest.fixture
    def parent(self):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        yield process
        process.kill()
        process.wait()

    @pytest.fixture
    def settings(self, settings, parent, tmp_path, monkeypatch):
        (tmp_path / "trainer.py").write_text(self.SCRIPT)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        settings = replace(settings, launch=[sys.executable, str(tmp_path / "trainer.py")], parent=parent.pid)
        settings.key_file.unlink()  # made at the first start
        yield settings
        client.stop_trainer(settings)

    def ask_pid(self, settings, base_dir):
        return ask_trainer(settings, base_dir, "status")[0]["pid"]

    def assert_ends(self, pid):
        deadline = time.monotonic() + 60
        while client._runs(str(pid), "fedlpp_hf.flower.trainer_process"):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def test_starts_on_demand_and_stays(self, settings, base_dir):
        assert not settings.socket_file.exists()
        pid = self.ask_pid(settings, base_dir)
        assert pid != os.getpid() and self.ask_pid(settings, base_dir) == pid
        assert ask_trainer(settings, base_dir, "train", b"task")[1] == b"task"
        assert stat.S_IMODE(settings.key_file.stat().st_mode) == 0o600
        client.stop_trainer(settings)
        self.assert_ends(pid)
        assert not settings.socket_file.exists() and not settings.pid_file.exists()

    def test_starts_again_after_a_crash(self, settings, base_dir):
        pid = self.ask_pid(settings, base_dir)
        os.kill(pid, signal.SIGKILL)
        self.assert_ends(pid)
        assert self.ask_pid(settings, base_dir) != pid

    def test_one_that_does_not_answer_is_replaced(self, settings, base_dir, monkeypatch):
        pid = self.ask_pid(settings, base_dir)
        os.kill(pid, signal.SIGSTOP)
        status = client._status
        # In earnest it is given half a minute.
        monkeypatch.setattr(client.local_socket, "CALL_TIMEOUT", 2.0)
        monkeypatch.setattr(client, "CALL_TIMEOUT", 2.0)
        assert status(settings) is None
        assert self.ask_pid(settings, base_dir) != pid
        self.assert_ends(pid)

    def test_another_base_is_another_trainer(self, settings, base_dir, tmp_path):
        pid = self.ask_pid(settings, base_dir)
        other = tmp_path / "other"
        other.mkdir()
        (other / "base_manifest.json").write_text(json.dumps({"fingerprint": "b" * 64}))
        status, _ = ask_trainer(settings, other, "status")
        assert status["pid"] != pid and status["base"] == "b" * 64
        self.assert_ends(pid)

    def test_stops_in_the_middle_of_a_task(self, settings, base_dir, monkeypatch):
        monkeypatch.setattr(client, "CALL_TIMEOUT", 1.0)
        pid = self.ask_pid(settings, base_dir)
        errors = []

        def ask():
            try:
                client._call(settings, "train", b"long", 60)
            except (OSError, EOFError) as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.5)
        client.stop_trainer(settings)
        thread.join(timeout=30)
        assert errors
        self.assert_ends(pid)

    def test_ends_with_its_parent(self, settings, base_dir, parent):
        pid = self.ask_pid(settings, base_dir)
        parent.kill()
        parent.wait()
        self.assert_ends(pid)


class TestStopTrainer:
    @pytest.fixture
    def start(self, settings):
        processes = []

        def start(*words):
            processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words]))
            settings.pid_file.write_text(str(processes[0].pid))
            return processes[0]

        yield start
        processes[0].kill()
        processes[0].wait()

    def test_kills_one_that_does_not_listen(self, start, settings):
        trainer = start(client.TRAINER)
        client.stop_trainer(settings)  # though nobody has asked for its exit code yet
        assert trainer.wait(timeout=0) == -signal.SIGKILL and not settings.pid_file.exists()

    def test_spares_another_that_got_the_id(self, start, settings):
        other = start()
        client.stop_trainer(settings)
        assert other.poll() is None and not settings.pid_file.exists()


class TestSettings:
    def test_round_trip(self, settings):
        assert ClientSettings.read(settings.write()) == settings

    def test_damaged_file(self, tmp_path):
        (tmp_path / "client.json").write_text("{}")
        with pytest.raises(ValueError, match=r"client\.json.*can't be read"):
            ClientSettings.read(tmp_path / "client.json")


class TestBaseInPieces:
    def receive_all(self, packed, cache, step=10_000, until=None):
        have = count_received(cache, packed.fingerprint)
        while have < (until or packed.size):
            have = receive_piece(cache, packed.fingerprint, **packed.read(have, step))
        return have

    @pytest.fixture
    def packed(self, llama_base, tmp_path):
        return PackedBase(llama_base, tmp_path / "base.packed")

    def test_arrives_as_it_was(self, packed, llama_base, tmp_path):
        assert find_base(tmp_path / "cache", packed.fingerprint) is None
        self.receive_all(packed, tmp_path / "cache")
        base = find_base(tmp_path / "cache", packed.fingerprint)
        assert {file.name for file in base.iterdir()} == {file.name for file in llama_base.iterdir()}
        assert all((base / file.name).read_bytes() == file.read_bytes() for file in llama_base.iterdir())

    def test_resumes_where_it_broke_off(self, packed, tmp_path):
        self.receive_all(packed, tmp_path, until=20_000)
        assert count_received(tmp_path, packed.fingerprint) == 20_000
        assert receive_piece(tmp_path, packed.fingerprint, **packed.read(0, 100)) == 20_000  # a repeated piece
        self.receive_all(packed, tmp_path)
        assert find_base(tmp_path, packed.fingerprint)

    def test_damaged_piece_is_not_kept(self, packed, tmp_path):
        piece = packed.read(0, 1000)
        with pytest.raises(ValueError, match="damaged"):
            receive_piece(tmp_path, packed.fingerprint, **(piece | {"data": b"x" * 1000}))
        assert count_received(tmp_path, packed.fingerprint) == 0

    def test_another_base_is_refused(self, packed, tmp_path):
        with pytest.raises(ValueError, match="instead of aaaaaaaaaaaa"):
            receive_piece(tmp_path, FINGERPRINT, **packed.read(0, packed.size))
        assert count_received(tmp_path, FINGERPRINT) == 0

    def test_fingerprint_is_no_path(self, tmp_path):
        with pytest.raises(ValueError, match="no fingerprint"):
            receive_piece(tmp_path, "../" + "a" * 61, offset=0, size=1, sha256="", data=b"")

    def test_damaged_base_is_not_trained_on(self, packed, settings, tmp_path):
        self.receive_all(packed, tmp_path / "cache")
        base = find_base(tmp_path / "cache", packed.fingerprint)
        weights = base / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        (tmp_path / "rows.jsonl").write_text('{"input_ids": [1, 2], "labels": [1, 2]}\n')
        config = tmp_path / "federation.yaml"
        config.write_text(f"trainer: {Path(__file__).parent / 'integration' / 'flower_task.py'}:make_trainer\n")
        settings = replace(settings, config=str(config), data=str(tmp_path / "rows.jsonl"))
        with pytest.raises(ValueError, match=r"model\.safetensors` is not the exported file"):
            client.make_client_trainer(settings, base)

    def test_base_that_changed_in_memory_is_not_trained_on(self):
        def prove_base_unmoved():
            raise RuntimeError("The base differs")

        trainer = SimpleNamespace(guard=SimpleNamespace(prove_base_unmoved=prove_base_unmoved))
        with pytest.raises(RuntimeError, match="The base differs"):
            client.train_task(trainer, b"task")

    def test_own_base_from_a_private_repository(self, llama_base, tmp_path, hub, monkeypatch):
        files = {file.name: file.read_bytes() for file in Path(llama_base).iterdir()}
        hub.add_repo("owner/base", files)
        fingerprint = read_fingerprint(llama_base)
        monkeypatch.setenv("HF_TOKEN", "reader")  # the client's own: it can't write
        path = find_base(tmp_path / "bases", fingerprint, "owner/base")
        assert {file.name: file.read_bytes() for file in path.iterdir() if file.name in files} == files
        with pytest.raises(ValueError, match="the federation's is aaaaaaaaaaaa"):
            find_base(tmp_path / "bases", FINGERPRINT, "owner/base")
        monkeypatch.setenv("HF_TOKEN", "nobody")
        hub.add_repo("owner/other", files)
        with pytest.raises(OSError, match="owner/other"):
            find_base(tmp_path / "bases", fingerprint, "owner/other")

    def test_own_base_must_be_the_federations(self, llama_base, tmp_path):
        fingerprint = read_fingerprint(llama_base)
        assert find_base(tmp_path, fingerprint, str(llama_base)) == Path(llama_base)
        with pytest.raises(ValueError, match="the federation's is aaaaaaaaaaaa"):
            find_base(tmp_path, FINGERPRINT, str(llama_base))


class TestRemoteConfig:
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

    def test_base_with_full_precision_linears_is_refused(self, settings, full_llama, tmp_path):
        export_base(full_llama, tmp_path / "base-32", embedding_bits=32, model_class=AutoModelForCausalLM)
        with pytest.raises(ValueError, match=r"1 linear layers in full precision \(lm_head\.weight\)"):
            client.make_client_trainer(settings, tmp_path / "base-32")


class TestFlowerVersion:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        def run(installed):
            def version(package):
                if installed is None:
                    raise PackageNotFoundError(package)
                return installed

            monkeypatch.setattr(flower_version, "version", version)
            monkeypatch.setattr(
                flower_version, "requires", lambda package: ["torch>=2", "flwr<1.42,>=1.41; extra == 'flower'"]
            )
            with pytest.raises(SystemExit) as exit:
                cli.main(["client", "--config", "nothing.yaml", "--data", "nothing.jsonl"])
            assert exit.value.code == 2
            return capsys.readouterr().err

        return run

    @pytest.mark.parametrize("installed", ["1.40.0", "1.42.0", "1.42.0rc1", "2.0"])
    def test_another_one_is_refused_in_one_line(self, installed, run):
        line = f"fedlpp-hf: error: flwr {installed} is installed; this version of fedlpp_hf was tested with flwr<1.42,>=1.41"
        told = run(installed)
        assert told.startswith(line) and told.count("\n") == 1

    def test_none_is_asked_for(self, run):
        assert run(None) == (
            "fedlpp-hf: error: This needs Flower (flwr<1.42,>=1.41, on Python 3.11 or newer): pip install 'fedlpp_hf[flower]'.\n"
        )

    def test_one_within_the_range_passes(self, monkeypatch):
        monkeypatch.setattr(flower_version, "version", lambda package: "1.41.3")
        monkeypatch.setattr(flower_version, "requires", lambda package: ["flwr<1.42,>=1.41; extra == 'flower'"])
        flower_version.check_flower()


def test_certificates(tmp_path):
    pytest.importorskip("cryptography")
    from fedlpp_hf.flower.certificates import make_certificates, make_node_key

    make_certificates(tmp_path, ["127.0.0.1", "localhost"])
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_certificates(tmp_path, ["127.0.0.1"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    make_certificates(tmp_path, ["server.example"])  # another name: a new certificate from the same authority
    assert (tmp_path / "ca.crt").read_bytes() == first["ca.crt"]
    assert (tmp_path / "server.crt").read_bytes() != first["server.crt"]
    key = make_node_key(tmp_path)
    assert make_node_key(tmp_path) == key and key.read_bytes() == (tmp_path / "node.key").read_bytes()
    for name in ("ca.key", "server.key", "node.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
