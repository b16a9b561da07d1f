# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a client tells the server of an error: its kind, and a number under which the client's own log has the rest.

The text of an exception may quote rows (`KeyError: 'Jane Doe …'`) and paths. It stays with the client.
"""

import logging
import secrets


class SayableError(RuntimeError):
    """An error whose text is made of nothing that is the client's own, so that the server may read it."""


def describe_error(error: Exception, logger: logging.Logger) -> str:
    """The text for the server; all of the error goes into the client's log.

    Args:
        error: what was raised; called where it was caught.
        logger: of the client.
    """
    if isinstance(error, SayableError):
        logger.error("%s", error)
        return str(error)
    number = secrets.token_hex(4)
    logger.error("Error %s, of which the server learns the kind and this number alone:", number, exc_info=error)
    return f"{type(error).__name__}; the client's log has its text under {number}"
