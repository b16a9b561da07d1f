# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The ClientApp: passes the server's requests to this client's trainer.

Flower starts a new process for every message, so nothing at the top may import torch.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from .. import __version__
from .base_transfer import count_received, find_base, receive_piece
from .client_settings import ClientSettings
from .client_trainer import describe_trainer, make_client_trainer, train_task
from .errors import SayableError, describe_error
from .grid_requests import BASE, DESCRIBE, RECORD, TRAIN
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
    task = bytes(request["task"])
    fingerprint, copy = _read_base(request)
    base_dir = find_base(settings.cache_dir, fingerprint, settings.base, copy)
    if base_dir is None:
        raise SayableError(f"this client no longer has the base {fingerprint[:12]}…; restart it")
    if settings.warm:
        return {"update": ask_trainer(settings, base_dir, "train", task, float(request["timeout"]))[1]}
    return {"update": train_task(make_client_trainer(settings, base_dir), task)}


def _read_base(request: Mapping[str, Any]) -> tuple[str, str | None]:
    """The fingerprint of the federation's base, and what identifies this client's copy, where copies are marked."""
    return str(request["base"]), str(request["copy"]) if "copy" in request else None


_ANSWERS = {DESCRIBE: _describe, BASE: _describe, TRAIN: _train}
