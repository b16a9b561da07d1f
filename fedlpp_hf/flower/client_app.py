# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The ClientApp: passes the server's requests to this client's trainer.

Flower starts a new process for every message, so nothing at the top may import torch.
"""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from .. import __version__
from .base_transfer import count_received, find_base, receive_piece
from .client_settings import ClientSettings
from .client_trainer import answer_sum, describe_trainer, make_client_trainer, name_answer, train_task
from .errors import SayableError, describe_error
from .grid_requests import BASE, DESCRIBE, RECORD, SUM, TRAIN
from .local_trainer import ask_trainer


logger = logging.getLogger(__name__)


def make_client_app() -> ClientApp:
    """The ClientApp of every client; what it trains on is in its own [`ClientSettings`]."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        try:
            settings = ClientSettings.read(str(context.node_config["settings"]))
            request = message.content.config_records[RECORD]
            content = _ANSWERS[message.metadata.message_type](settings, request)
        except Exception as error:
            # So that `round.json` has a reason; from Flower the server would only learn that the ClientApp failed.
            content = {"error": describe_error(error, logger)}
        return Message(RecordDict({RECORD: ConfigRecord(content)}), reply_to=message)

    app.query("describe")(answer)
    app.query("base")(answer)
    app.query("sum")(answer)
    app.train()(answer)
    return app


def _describe(settings: ClientSettings, request: Mapping[str, Any]) -> dict[str, Any]:
    """The client's number of rows or, without the whole base, the bytes of it received so far."""
    if request["version"] != __version__:
        raise SayableError(
            f"this client runs fedlpp_hf {__version__}, the server {request['version']}; install the same version"
        )
    fingerprint, copy = _read_base(request)
    if "data" in request:
        piece: dict[str, Any] = {name: request[name] for name in ("offset", "size", "sha256", "data")}
        receive_piece(settings.cache_dir, fingerprint, **piece, copy=copy)
    base_dir = find_base(settings.cache_dir, fingerprint, settings.base, copy)
    if base_dir is None:
        return {"received": count_received(settings.cache_dir, fingerprint, copy)}
    if settings.warm:
        description, _ = ask_trainer(settings, base_dir, "status")
    else:
        description = describe_trainer(make_client_trainer(settings, base_dir))
    return {"clients": json.dumps(description["clients"])}


def _train(settings: ClientSettings, request: Mapping[str, Any]) -> dict[str, Any]:
    task, base_dir = bytes(request["task"]), _find_base(settings, request)
    if settings.warm:
        header, data = ask_trainer(settings, base_dir, "train", task, float(request["timeout"]))
        return {header["answer"]: data}
    trainer = make_client_trainer(settings, base_dir)
    return {name_answer(trainer): train_task(trainer, task)}


def _sum(settings: ClientSettings, request: Mapping[str, Any]) -> dict[str, Any]:
    """The next step of the sum that the client's trainer has begun."""
    data, about = bytes(request["sum"]), {name: str(request[name]) for name in ("client", "step")}
    base_dir, timeout = _find_base(settings, request), float(request["timeout"])
    if settings.warm:
        return {"sum": ask_trainer(settings, base_dir, "sum", data, timeout, about)[1]}
    return {"sum": answer_sum(make_client_trainer(settings, base_dir), about["client"], about["step"], data)}


def _find_base(settings: ClientSettings, request: Mapping[str, Any]) -> str | os.PathLike:
    fingerprint, copy = _read_base(request)
    base_dir = find_base(settings.cache_dir, fingerprint, settings.base, copy)
    if base_dir is None:
        raise SayableError(f"this client no longer has the base {fingerprint[:12]}…; restart it")
    return base_dir


def _read_base(request: Mapping[str, Any]) -> tuple[str, str | None]:
    """The fingerprint of the federation's base, and what identifies this client's copy, where copies are marked."""
    return str(request["base"]), str(request["copy"]) if "copy" in request else None


_ANSWERS = {DESCRIBE: _describe, BASE: _describe, TRAIN: _train, SUM: _sum}
