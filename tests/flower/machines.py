# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The machines of a federation over a network, as processes on this one, and a network between them."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path


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
    """Server and clients as users start them, each in separate processes.

    `overrides` are the server's flags that override the configuration, `server_options` its other options.
    """

    def __init__(self, directory, config, rows, overrides=(), server_options=()):
        self.directory, self.config, self.rows = directory, config, rows
        self.overrides, self.server_options = overrides, server_options
        self.processes = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def prepare_keys(self, clients):
        """What users exchange before the start: the server's certificate and the nodes' public keys."""
        from fedlpp_hf.flower.certificates import make_certificates, make_node_key

        make_certificates(self.directory / "server", ["127.0.0.1", "localhost"])
        (self.directory / "keys").mkdir()
        for client in clients:
            make_node_key(self.directory / client)
            shutil.copy(self.directory / client / "node.pub", self.directory / "keys" / f"{client}.pub")
        self.server_options = (*self.server_options, "--client_keys", "keys")

    def start(self, side, *arguments):
        return self._start(side, "fedlpp_hf.cli.main", side, "--config", str(self.config), *arguments)

    def start_hostile(self, client, seed, count):
        """A client that breaks the rules, `count` of them before it joins; what it did is in `hostile.log`."""
        key = str(self.directory / client / "node.key")
        arguments = [f"127.0.0.1:{self.port}", "server/ca.crt", key, client, str(seed), str(count), "hostile.log"]
        return self._start("hostile", "tests.flower.hostile", *arguments)

    def _start(self, side, module, *arguments):
        # Without the launcher's own directory in front, a checkout that is not installed would not be found.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "FLWR_TELEMETRY_ENABLED": "1",  # as it is by default
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [sys.executable, "-m", module, *arguments]
        with open(self.directory / f"{side}-{len(self.processes)}.log", "wb") as log:
            process = subprocess.Popen(command, cwd=self.directory, env=environment, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_server(self, *flags):
        options = ["--state_dir", "server", "--port", str(self.port), "--output_dir", "out", *self.server_options]
        return self.start("server", *options, *self.overrides, *flags)

    def start_client(self, client, *flags, port=None):
        options = [
            "--state_dir",
            client,
            "--cache_dir",
            f"cache-{client}",
            "--data",
            str(self.rows / f"{client}.jsonl"),
        ]
        options += ["--server", f"127.0.0.1:{port or self.port}", "--certificate", "server/ca.crt"]
        return self.start("client", *options, *flags)

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
