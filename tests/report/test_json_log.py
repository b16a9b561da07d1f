# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The log as lines of JSON: one object a line whatever is logged, bounded, without secrets."""

import json
import logging
import stat
from types import SimpleNamespace

import pytest

from fedlpp_hf.report import json_log
from fedlpp_hf.report.json_log import log_to_file


LOGGER = logging.getLogger("fedlpp_hf.some.module")
TOKEN = "hf_" + "a1B2" * 8


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    with log_to_file(path):
        LOGGER.info("round %d", 3)
        LOGGER.debug("detail")
        try:
            raise KeyError("inner")
        except KeyError:
            LOGGER.exception("failed")
        logging.getLogger("transformers.trainer").warning("from elsewhere")
        logging.getLogger("httpx").warning("not ours")
    LOGGER.warning("too late")
    lines = read_lines(path)
    assert [line["message"] for line in lines] == ["round 3", "failed", "from elsewhere"]
    assert lines[0]["level"] == "info" and lines[0]["logger"] == LOGGER.name and lines[0]["process"]
    assert lines[0]["time"].endswith("+00:00") and "traceback" not in lines[0]
    assert lines[1]["traceback"].endswith("KeyError: 'inner'\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_forges_a_line_or_moves_a_cursor(tmp_path, monkeypatch):
    # pytest would keep what is logged, and its workers can't send half of a surrogate pair.
    monkeypatch.setattr(logging.root, "handlers", [])
    text = 'x\n{"level": "info", "message": "forged"}\r\x1b[2J\u2028\u202e\ud800'
    with log_to_file(tmp_path / "log"):
        LOGGER.warning(text)
    assert [line["message"] for line in read_lines(tmp_path / "log")] == [text]
    assert (tmp_path / "log").read_bytes().count(b"\n") == 1
    assert all(32 <= byte < 127 or byte == 10 for byte in (tmp_path / "log").read_bytes())


def test_secrets_are_hidden(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    args = SimpleNamespace(hub_token="given as an option", push_to_hub_token=None)
    with log_to_file(tmp_path / "log", args):
        LOGGER.warning(
            f"{TOKEN} https://me:pass@host/x Authorization: Bearer abc.def given as an option from-the-environment"
        )
        try:
            raise RuntimeError(f"401 for {TOKEN}")
        except RuntimeError:
            LOGGER.exception("upload")
    text = (tmp_path / "log").read_text()
    for secret in (TOKEN, "me:pass", "abc.def", "given as an option", "from-the-environment"):
        assert secret not in text, secret
    assert text.count("[hidden]") == 6


def test_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(json_log, "MAX_BYTES", 20_000)
    path = tmp_path / "log"
    with log_to_file(path):
        LOGGER.warning("x" * 10**6)
        assert len(path.read_text()) < 9_000
        for number in range(2000):
            LOGGER.warning("%d %s", number, "y" * 100)
    files = sorted(tmp_path.glob("log*"))
    assert {file.name for file in files} == {"log", "log.lock", *(f"log.{n}" for n in range(1, json_log.BACKUPS + 1))}
    assert all(file.stat().st_size <= 20_000 and stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert read_lines(path)[-1]["message"].startswith("1999 ")


def test_loggers_that_keep_to_themselves_are_heard(tmp_path):
    """As that of `fedlpp_hf.flower` in the ServerApp."""
    deaf = logging.getLogger("fedlpp_hf.deaf")
    deaf.propagate = False
    try:
        with log_to_file(tmp_path / "log"):
            logging.getLogger("fedlpp_hf.deaf.child").warning("heard once")
    finally:
        deaf.propagate = True
    assert [line["message"] for line in read_lines(tmp_path / "log")] == ["heard once"]


def test_one_process_a_file(tmp_path):
    refused = pytest.raises(ValueError, match="another process writes there. Give each process a file of its own")
    with log_to_file(tmp_path / "log"), refused, log_to_file(tmp_path / "log"):
        pass
    with log_to_file(tmp_path / "log"):
        pass
    refused = pytest.raises(ValueError, match="log_json='.*' can't be written")
    with refused, log_to_file(tmp_path / "log" / "below-a-file"):
        pass


def test_levels_and_handlers_are_as_before(tmp_path):
    logger = logging.getLogger("fedlpp_hf")
    before = logger.level, list(logger.handlers)
    with log_to_file(tmp_path / "log"):
        assert logger.isEnabledFor(logging.INFO)
    assert (logger.level, list(logger.handlers)) == before
