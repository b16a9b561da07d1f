# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The Flower transport (extra `flower`): tasks to clients and updates back, over Flower's Grid. The round loop, the state
and what counts as an update stay with [`FederatedServer`], so that a federation over Flower ends in the bits of one in
process.

Messages carry the bytes of [`ClientTask`] and [`ClientUpdate`] in a ConfigRecord: an ArrayRecord refuses bfloat16.
torch is imported by the server's side only: the ClientApp is a new process in every message.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from .. import __version__
from .base_transfer import PackedBase, count_received, find_base, receive_piece
from .trainer_process import ClientSettings, ask_trainer, describe_trainer, make_client_trainer, train_task
from .version import check_flower


if TYPE_CHECKING:
    from ..wire.messages import ClientFailure, ClientTask, ClientUpdate
    from .loading import RemoteConfig

logger = logging.getLogger(__name__)

# Names a file with the path of the YAML file and the flags. Flower's own way, the run's configuration, goes to every
# client, and the flags tell where the owner's model is.
SERVER_FILE = "FEDLPP_HF_SERVER"
RECORD = "fedlpp_hf"
DESCRIBE, BASE, TRAIN = "query.describe", "query.base", "train"
_ROUND_SECONDS = 3600.0  # that clients have for a task, transport included, unless `round_timeout` says otherwise
_SOON_SECONDS = 10.0  # until a node that has missed its heartbeat counts as offline; it sends one every 30 s, for 60 s
_POLL_SECONDS = 0.2  # Flower's own `send_and_receive` looks every 3 s


def make_server_app() -> ServerApp:
    """The ServerApp: runs the federation that the file named by the variable `FEDLPP_HF_SERVER` tells of."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        # The root logger stays as it is: at this level Flower's HTTP client would write a line for every request.
        logger.setLevel(logging.INFO)
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False
        check_flower()
        if SERVER_FILE not in os.environ:
            raise ValueError(f"{SERVER_FILE} is not set in the SuperLink's environment; `fedlpp-hf server` sets it.")
        path = Path(os.environ[SERVER_FILE])
        settings = json.loads(path.read_text(encoding="utf-8"))
        with _note_process(path.with_suffix(".pid")):
            run_federation(grid, settings["config"], settings["flags"])

    return app


@contextlib.contextmanager
def _note_process(path: Path) -> Iterator[None]:
    # A ServerApp can outlive its SuperLink; whoever started that one ends this one by its id.
    path.write_text(str(os.getpid()))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def run_federation(grid: Grid, config: str, flags: list[str]) -> None:
    """Make the server's trainer, gather the clients, run or resume the rounds, and merge at the end."""
    from ..server.store import FEDERATION_DIR, RoundStore
    from .loading import load_trainer

    trainer, remote = load_trainer(config, flags, model=None, train_dataset={})
    args = trainer.args
    store = RoundStore(args.output_dir)
    directory = store.output_dir / FEDERATION_DIR
    exported = directory / "base"
    base_dir = exported if remote.base is None or trainer.owner is not None else remote.base
    base = PackedBase(base_dir, directory / "base.packed")
    # A resumed federation has the clients that it began with, whoever is here now: sampling depends on them.
    known = store.read()["clients"] if args.resume_from_checkpoint and store.latest() is not None else None
    clients = FlowerClients(grid, remote, base, args.round_timeout)
    present = clients.gather(args.num_clients if known is None else len(known), known and args.min_clients)
    trainer.train_remotely(clients.train, present if known is None else known, args.resume_from_checkpoint)


class FlowerClients:
    """The clients that a Grid reaches, by the ids that they announce; one node may stand for several."""

    def __init__(self, grid: Grid, remote: "RemoteConfig", base: PackedBase, round_timeout: float | None = None):
        self.grid, self.remote, self.base = grid, remote, base
        self.round_timeout = _ROUND_SECONDS if round_timeout is None else round_timeout
        self.num_examples: dict[str, int] = {}
        self._nodes: dict[str, int] = {}  # by client id
        self._known: dict[str, int] = {}  # the same, with those that are away
        self._described: dict[int, str] = {}  # by node: since when it has been connected
        self._refused: dict[int, str] = {}

    def gather(self, count: int, at_least: int | None = None) -> dict[str, int]:
        """Wait until `count` clients are connected and hold the base; returns their numbers of rows. With `at_least`, so
        many will do after `lost_timeout`.

        Raises:
            RuntimeError: if they are not there within `join_timeout`, naming those that were refused and why.
        """
        began = time.monotonic()
        while True:
            self._welcome(self.remote.join_timeout)  # a client's first answer may load a model
            waited = time.monotonic() - began
            needed = count if at_least is None or waited <= self.remote.lost_timeout else at_least
            if len(self._nodes) >= needed:
                break
            if waited > self.remote.join_timeout:
                refused = "".join(f" Node {node}: {reason}." for node, reason in self._refused.items())
                raise RuntimeError(
                    f"{len(self._nodes)} of {count} clients joined within {self.remote.join_timeout:.0f} s "
                    f"({', '.join(self._nodes) or 'none'}).{refused} Start the others, or lower num_clients."
                )
            time.sleep(_POLL_SECONDS)
        logger.info("Clients: %s", ", ".join(f"{client} ({rows} rows)" for client, rows in self.num_examples.items()))
        return dict(self.num_examples)

    def train(self, tasks: list["ClientTask"]) -> Iterator["ClientUpdate | ClientFailure"]:
        """Send the tasks and yield what comes back, in the order of arrival; every task is answered once."""
        from ..wire.messages import ClientFailure, ClientUpdate

        left = {task.client_id: task for task in tasks}
        reasons: dict[str, str] = {}
        timeout = self.round_timeout
        for _ in range(1 + self.remote.task_retries):
            self._welcome(self.remote.lost_timeout)
            for client in left.keys() - self._nodes.keys():
                refusal = self._refused.get(self._known.get(client, -1))
                reasons[client] = "it is not connected" if refusal is None else f"it is refused: {refusal}"
            requests = (
                (
                    client,
                    self._nodes[client],
                    {"task": task.to_bytes(), "base": self.base.fingerprint, "timeout": timeout},
                )
                for client, task in list(left.items())
                if client in self._nodes
            )
            for client, answer in self._ask(TRAIN, requests, timeout):
                try:
                    if isinstance(answer, str) or "error" in answer:
                        raise ValueError(answer if isinstance(answer, str) else answer["error"])
                    update = ClientUpdate.from_bytes(answer["update"])
                    if update.client_id != client:
                        raise ValueError(f"it answered in the name of {update.client_id!r}")
                except (ValueError, KeyError, TypeError) as error:
                    reasons[client] = str(error)
                    logger.warning("Client %s: %s", client, error)
                else:
                    del left[client]
                    yield update
            if not left:
                return
        for client in left:
            yield ClientFailure(client, reasons[client])

    def _welcome(self, timeout: float) -> None:
        """Learn who has connected, or connected anew, and send the base to those who lack it."""
        present = self._present()
        strangers = [node for node, since in present.items() if self._described.get(node) != since]
        for client, node in list(self._nodes.items()):
            if node not in present or node in strangers:  # what connects anew may be another version, on another base
                del self._nodes[client]
        request = {"base": self.base.fingerprint, "version": __version__}
        requests: Iterable[tuple[int, int, dict[str, Any]]] = ((node, node, request) for node in strangers)
        received: dict[int, int] = {}
        kind, step = DESCRIBE, self.remote.chunk_megabytes << 20
        while strangers:
            lacking: dict[int, int] = {}
            for node, answer in self._ask(kind, requests, timeout):
                if isinstance(answer, str) or "error" in answer:
                    self._refuse(node, answer, present[node])
                elif "received" in answer and int(answer["received"]) > received.get(node, -1):
                    lacking[node] = received[node] = int(answer["received"])
                elif "received" in answer:
                    self._refuse(
                        node, {"error": "it does not keep the pieces of the base that it is sent"}, present[node]
                    )
                else:
                    self._register(node, json.loads(answer["clients"]), present[node])
            strangers, kind, timeout = list(lacking), BASE, self.round_timeout
            requests = ((node, node, request | self.base.read(start, step)) for node, start in lacking.items())

    def _register(self, node: int, rows: Mapping[str, int], since: str) -> None:
        taken = [client for client in rows if self._nodes.get(client, node) != node]
        if taken:
            self._refuse(node, {"error": f"it announces {taken[0]!r}, which node {self._nodes[taken[0]]} is"}, since)
            return
        self._described[node] = since
        self._refused.pop(node, None)
        for client, count in rows.items():
            self._nodes[client] = self._known[client] = node
            self.num_examples[client] = count

    def _refuse(self, node: int, answer: Mapping[str, Any] | str, since: str) -> None:
        """Note why a node is none of the clients. One that said so itself is not asked again before it reconnects."""
        if not isinstance(answer, str):
            self._described[node] = since
        reason = answer if isinstance(answer, str) else str(answer["error"])
        if self._refused.get(node) != reason:
            logger.warning("Node %d is refused: %s", node, reason)
        self._refused[node] = reason

    def _ask(
        self, kind: str, requests: Iterable[tuple[Any, int, dict[str, Any]]], timeout: float
    ) -> Iterator[tuple[Any, Mapping[str, Any] | str]]:
        """Send (name, node, content) and yield (name, answer) as they come; an answer that is a str says what failed."""
        waiting: dict[str, tuple[Any, int]] = {}
        missed: dict[str, float] = {}
        deadline = time.monotonic() + timeout
        for name, node, content in requests:
            message = Message(RecordDict({RECORD: ConfigRecord(content)}), node, kind, ttl=timeout)
            (identity,) = self.grid.push_messages([message])
            if identity:
                waiting[identity] = name, node
            else:
                yield name, "it could not be reached"
        while waiting:
            present = self._present()
            # Asked for an answer of a node that is offline by then, Flower would make up an error and drop the answer for
            # good.
            online = [identity for identity, (_, node) in waiting.items() if node in present]
            for message in self.grid.pull_messages(online) if online else ():
                if message.metadata.reply_to_message_id in waiting:  # else it is there twice
                    name, _ = waiting.pop(message.metadata.reply_to_message_id)
                    yield name, _read(message)
            now = time.monotonic()
            for identity, (name, node) in list(waiting.items()):
                since = missed.setdefault(identity, now) if node not in present else missed.pop(identity, now)
                if now > deadline:
                    reason = f"it did not answer within {timeout:.0f} s"
                elif now - since > self.remote.lost_timeout:
                    reason = f"there was no sign of it for {self.remote.lost_timeout:.0f} s"
                else:
                    continue
                del waiting[identity]
                yield name, reason
            if waiting:
                time.sleep(_POLL_SECONDS)

    def _present(self) -> dict[int, str]:
        """The nodes that are online, and will be for some seconds without another heartbeat, with the time since when."""
        soon = time.time() + _SOON_SECONDS  # the SuperLink's clock is this machine's
        return {node.node_id: node.last_activated_at for node in self.grid.get_nodes() if node.online_until > soon}


def _read(message: Message) -> Mapping[str, Any] | str:
    if message.has_error():
        return f"Flower reports: {message.error.reason} (code {message.error.code})"
    record = message.content.config_records.get(RECORD)
    if record is None:
        return "its answer is none of this library's"
    return record


def make_client_app() -> ClientApp:
    """The ClientApp: hands what the server asks to this client's trainer (see [`ClientSettings`])."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        try:
            settings = ClientSettings.read(str(context.node_config["settings"]))
            request = message.content.config_records[RECORD]
            content = _ANSWERS[message.metadata.message_type](settings, request)
        except Exception as error:
            # The server names the reason in `round.json`; Flower alone would only say that the ClientApp failed.
            logger.exception("The request can't be answered.")
            content = {"error": f"{type(error).__name__}: {error}"}
        return Message(RecordDict({RECORD: ConfigRecord(content)}), reply_to=message)

    app.query("describe")(answer)
    app.query("base")(answer)
    app.train()(answer)
    return app


def _answer_describe(settings: ClientSettings, request: Mapping[str, Any]) -> dict[str, Any]:
    if request["version"] != __version__:
        raise ValueError(
            f"this client runs fedlpp_hf {__version__}, the server {request['version']}; install the same"
        )
    fingerprint = str(request["base"])
    if "data" in request:
        piece: dict[str, Any] = {name: request[name] for name in ("offset", "size", "sha256", "data")}
        receive_piece(settings.cache_dir, fingerprint, **piece)
    base_dir = find_base(settings.cache_dir, fingerprint, settings.base)
    if base_dir is None:
        return {"received": count_received(settings.cache_dir, fingerprint)}
    if settings.warm:
        description, _ = ask_trainer(settings, base_dir, "status")
    else:
        description = describe_trainer(make_client_trainer(settings, base_dir))
    return {"clients": json.dumps(description["clients"])}


def _answer_train(settings: ClientSettings, request: Mapping[str, Any]) -> dict[str, Any]:
    task = bytes(request["task"])
    base_dir = find_base(settings.cache_dir, str(request["base"]), settings.base)
    if base_dir is None:
        raise ValueError(f"this client does not hold the base {str(request['base'])[:12]}… any more; restart it")
    if settings.warm:
        return {"update": ask_trainer(settings, base_dir, "train", task, float(request["timeout"]))[1]}
    return {"update": train_task(make_client_trainer(settings, base_dir), task)}


_ANSWERS = {DESCRIBE: _answer_describe, BASE: _answer_describe, TRAIN: _answer_train}
