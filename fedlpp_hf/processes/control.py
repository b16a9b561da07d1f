# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Commands of the owner to the process that runs a federation: over a Unix socket beside the rounds, for this user alone.

`fedlpp-hf status` and its like import this module; nothing here may import torch.
"""

import contextlib
import fcntl
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import local_socket


KEY_FILE = "control.key"
SOCKET_FILE = "control.sock"
_AGAIN_SECONDS = 0.2
_MOST_CALLERS = 16  # at a time

Handle = Callable[[dict[str, Any]], Mapping[str, Any]]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def answer_commands(directory: Path, handle: Handle) -> Iterator[None]:
    """Answer commands in threads meanwhile. Who may call has this user's id, and has read the key in `directory`.

    Args:
        directory: `_federation` of the output_dir; made for this user alone if it is missing.
        handle: From a command (JSON values, with the name as `command`) to its answer; a ValueError is the refusal. It is
            called in other threads than this one.

    Raises:
        ValueError: if another process answers for this directory.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    key_file = directory / KEY_FILE
    local_socket.make_key(key_file)
    key = local_socket.read_key(key_file)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(open(key_file, "rb"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another process is running a federation in `{directory.parent}`, and answers `fedlpp-hf status`. Wait for it, "
                "end it, or choose another output_dir."
            ) from None
        except OSError:  # some network file systems have no locks; the store warns
            pass
        try:
            listener = stack.enter_context(local_socket.listen(directory / SOCKET_FILE))
        except OSError as error:  # nor have some of them sockets
            logger.warning(f"No command reaches this process: there can be no socket in `{directory}` ({error}).")
            yield
            return
        ours, theirs = socket.socketpair()  # closing a listener does not wake the thread that waits for callers
        stack.enter_context(theirs)
        thread = threading.Thread(target=_accept, args=(listener, theirs, key, handle), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ours.close()
            thread.join()


def ask(directory: Path, command: str, timeout: float = local_socket.CALL_TIMEOUT, **values: Any) -> Any:
    """Send a command to the process that runs a federation, and return its answer; None if there is no such process.

    Args:
        directory: `_federation` of the output_dir.
        command: Its name.
        timeout: Seconds to wait for the answer.
        values: What else the command says, as JSON has it.

    Raises:
        ValueError: the process's refusal.
        RuntimeError: if it belongs to another user, or does not answer.
    """
    path = directory / SOCKET_FILE
    try:
        key = local_socket.read_key(directory / KEY_FILE)
        answer, _ = local_socket.call(path, key, {"command": command, **values}, b"", timeout)
    except (FileNotFoundError, ConnectionRefusedError):  # the second one: it was killed, and has left its socket
        return None
    except PermissionError:
        raise RuntimeError(
            f"The federation in `{directory.parent}` is another user's. Run the command as that user, e.g. with sudo -u."
        ) from None
    except TimeoutError:
        raise RuntimeError(
            f"The process that runs the federation in `{directory.parent}` did not answer within {timeout:.0f} s."
        ) from None
    except (OSError, EOFError) as error:
        raise RuntimeError(
            f"The process behind `{path}` hung up ({error}). Is `{KEY_FILE}` that of this run?"
        ) from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["answer"]


def _accept(listener: socket.socket, over: socket.socket, key: bytes, handle: Handle) -> None:
    """Take callers until the other end of `over` is closed."""
    places = threading.Semaphore(_MOST_CALLERS)
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector:
        for end in (listener, over):
            selector.register(end, selectors.EVENT_READ)
        while over not in [ready.fileobj for ready, _ in selector.select()]:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:  # the caller has gone
                continue
            except OSError as error:  # out of descriptors, perhaps
                logger.warning(f"A caller could not be heard ({error}).")
                time.sleep(_AGAIN_SECONDS)
                continue
            if places.acquire(blocking=False):
                threading.Thread(target=_answer, args=(connection, key, handle, places), daemon=True).start()
            else:
                connection.close()


def _answer(connection: socket.socket, key: bytes, handle: Handle, places: threading.Semaphore) -> None:
    try:
        with connection, contextlib.suppress(OSError, EOFError, ValueError):  # whoever knows the key sends JSON
            request, _ = local_socket.receive_request(connection, key)
            try:
                answer: dict[str, Any] = {"answer": dict(handle(request))}
            except ValueError as error:
                answer = {"error": str(error)}
            except Exception as error:  # a caller must not wait for an answer that does not come
                logger.exception("A command failed")
                answer = {"error": f"The command failed ({type(error).__name__}: {error})."}
            local_socket.send(connection, answer, b"")
    finally:
        places.release()
