# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""The log as lines of JSON in a file that is rotated: bounded in all, one object a line, no secrets."""

import contextlib
import fcntl
import json
import logging
import os
import re
import traceback
from collections.abc import Iterator
from datetime import datetime, timezone
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any


LOGGERS = ("fedlpp_hf", "transformers", "flwr")
MAX_BYTES = 10_000_000  # of a file
BACKUPS = 5  # that are kept beside it
_MAX_TEXT = 8_000  # letters of a message, or of a traceback, whose end is kept
_HIDDEN = "[hidden]"
# What tokens of the Hub, of Flower and in URLs look like, whoever put them into a message.
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|(?i:(?<=bearer )\S+)")
_SECRET_OPTIONS = ("hub_token", "push_to_hub_token")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


@contextlib.contextmanager
def log_to_file(path: str | os.PathLike, args: Any = None) -> Iterator[None]:
    """Write what this library, Transformers and Flower log meanwhile, from INFO on, to `path`, readable by this user alone.

    Args:
        path: Of the file; the older ones are called `.1` to `.5`.
        args: A configuration, whose tokens are kept out.

    Raises:
        ValueError: if it can't be written, or another process writes there: each would rotate the other's lines away.
    """
    path = Path(path).absolute()
    secrets = {str(value) for name in _SECRET_OPTIONS if (value := getattr(args, name, None))}
    secrets |= {value for name in _SECRET_VARIABLES if (value := os.environ.get(name))}
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            handler = _PrivateFile(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8")
        except BlockingIOError:
            raise ValueError(
                f"log_json='{path}': another process writes there. Give each process a file of its own."
            ) from None
        except OSError as error:
            raise ValueError(f"log_json='{path}' can't be written ({error}). Choose another file.") from None
        handler.setFormatter(_Lines(secrets))
        loggers = [logging.getLogger(name) for name in _list_loggers()]
        before = [logger.level for logger in loggers]
        for logger in loggers:
            logger.addHandler(handler)
        ours = loggers[0]
        if not ours.isEnabledFor(logging.INFO):
            ours.setLevel(logging.INFO)  # of the others, what they log anyway
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)
            handler.close()


def _list_loggers() -> list[str]:
    """Those of [`LOGGERS`], and those below them that keep what they log to themselves."""
    known = [logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    deaf = [logger.name for logger in known if not logger.propagate and logger.name.startswith("fedlpp_hf.")]
    return [*LOGGERS, *sorted(deaf)]


class _PrivateFile(RotatingFileHandler):
    def _open(self) -> Any:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return open(descriptor, "a", encoding=self.encoding)


class _Lines(logging.Formatter):
    def __init__(self, secrets: set[str]):
        super().__init__()
        self.secrets = sorted(secrets, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": self._clean(record.getMessage()),
        }
        if record.exc_info and record.exc_info[0] is not None:
            # The end names the error.
            line["traceback"] = self._clean("".join(traceback.format_exception(*record.exc_info)), end=True)
        return json.dumps(line)  # in ASCII: a line break or an escape code is spelled out

    def _clean(self, text: str, end: bool = False) -> str:
        for secret in self.secrets:
            text = text.replace(secret, _HIDDEN)
        text = _SECRET.sub(_HIDDEN, text)
        if len(text) <= _MAX_TEXT:
            return text
        return f"…{text[-_MAX_TEXT:]}" if end else f"{text[:_MAX_TEXT]}…"
