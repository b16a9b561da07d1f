# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the server learns of a client's error: a kind and a number, never text that quotes rows or paths."""

import json
import logging
import re

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlpp_hf import __version__
from fedlpp_hf.flower import client_app
from fedlpp_hf.flower.client_app import make_client_app
from fedlpp_hf.flower.errors import SayableError, describe_error
from fedlpp_hf.flower.grid_requests import RECORD


ROW = "Jane Doe 1984-02-03"


def test_the_text_stays_in_the_clients_log(caplog):
    logger = logging.getLogger("client")
    with caplog.at_level(logging.ERROR):
        try:
            {}[ROW]
        except KeyError as error:
            told = describe_error(error, logger)
    assert re.fullmatch("KeyError; the client's log has its text under [0-9a-f]{8}", told)
    assert told.split()[-1] in caplog.text and ROW in caplog.text and "Traceback" in caplog.text


def test_what_is_made_to_be_said_is_said(caplog):
    assert describe_error(SayableError("another version"), logging.getLogger("client")) == "another version"
    assert "another version" in caplog.text


@pytest.mark.parametrize("warm", [False, True])
def test_a_row_that_breaks_the_users_code_is_not_told(settings, tmp_path, monkeypatch, warm):
    """As `KeyError: 'Jane Doe …'` of a mapping of labels, or a file that is not there."""

    def fail(*args, **kwargs):
        raise FileNotFoundError(f"{tmp_path}/ward-7/rows.jsonl: {ROW}")

    monkeypatch.setattr(client_app, "make_client_trainer", fail)
    monkeypatch.setattr(client_app, "ask_trainer", fail)
    monkeypatch.setattr(client_app, "find_base", lambda *args: tmp_path)
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)
    file = settings.write()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"warm": warm}))
    request = ConfigRecord({"base": "0" * 64, "version": __version__})
    told = ask(file, request, "query.describe")
    assert re.fullmatch("FileNotFoundError; the client's log has its text under [0-9a-f]{8}", told)
    request["version"] = "0.0.1"
    assert ask(file, request, "query.describe").startswith("this client runs fedlpp_hf")


def ask(settings_file, request, kind):
    """The error that the ClientApp answers."""
    message = Message(RecordDict({RECORD: request}), 1, kind, ttl=60)
    message.metadata.__dict__["_message_id"] = message.object_id
    context = Context(1, 1, {"settings": str(settings_file)}, RecordDict(), {})
    return make_client_app()(message, context).content[RECORD]["error"]
