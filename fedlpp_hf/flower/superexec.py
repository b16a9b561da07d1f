# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A client's SuperExec, which forks the ClientApp of each message off a process that has imported Flower already.

Flower's own asks for tasks all the time, and starts an interpreter for each, which takes more than a second of the processor to import
Flower. This one asks when the SuperNode says so, by a byte on its standard input, and ends with the SuperNode.

    python -m fedlpp_hf.flower.superexec HOST:PORT
"""

import gc
import importlib
import os
import select
import signal
import sys

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import run_clientapp


_AGAIN_SECONDS = 5.0  # it also asks unasked: a task whose process died before it began is offered again
_RETRY_SECONDS = 0.2


def main() -> None:
    """Run ClientApps until the SuperNode ends."""
    # It ends after the SuperNode, also where both are told to: a SuperNode without it ends at once, and does not tell the server.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    address = sys.argv[1]
    for module in ("client_app", "server_app"):  # what the app imports
        importlib.import_module(f"{__package__}.{module}")
    gc.collect()
    gc.freeze()  # else a child's first collection would copy all these pages
    parent = os.getpid()
    if (token := wait_for_task(address, sys.stdin.fileno())) is None:
        return
    # From here on this is another process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    try:
        run_clientapp(runtime_api_address=address, token=token, insecure=True, parent_pid=parent)
    except SystemExit as end:
        if "torch" in sys.modules:  # it has trained in this process (`--cold`), and may have more to clean up
            raise
        # The end of an interpreter visits all that was imported, and so copies every page of its parent: 0.4 s.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def wait_for_task(address: str, told: int) -> str | None:
    """Fork a process for each task and return the task's token in it; return None in this one after the SuperNode's end.

    Args:
        address: of the SuperNode's Runtime API.
        told: file descriptor on which the SuperNode says that there is a task.
    """
    # One thread only, so that nothing is half done at a fork.
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    pause = _AGAIN_SECONDS
    with RuntimeHttpClient.from_server_address(address, True, None, [version]) as client:
        while True:
            if select.select([told], [], [], pause)[0] and not os.read(told, 4096):
                return None
            pause = _AGAIN_SECONDS
            try:
                while token := client.AcquireTask(request).token:
                    if not os.fork():
                        return token
            except httpx.TransportError:
                pause = _RETRY_SECONDS
            _reap_children()


def _reap_children() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
