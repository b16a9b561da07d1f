# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What a process beside the trainer runs: it takes its setup from its parent, then answers requests until the parent leaves.

The setup alone is unpickled, as cloudpickle writes it: it comes from the parent, over a socket that both have inherited, and
functions and classes travel in it by value. So a script needs no `if __name__ == "__main__":`, and what is defined in a
notebook's cell is found. Requests and answers are messages of safetensors and JSON.
"""

import json
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..tensors.scratch import temporary_directory
from ..wire.encoding import decode_message, encode_message


# What `accelerate launch` and `torchrun` tell a worker. These processes are no workers of theirs.
_LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    *(f"{launcher}_{what}" for launcher in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD", "PMI") for what in ("SIZE", "RANK")),
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    # How they shard the model over their workers.
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
)
# Run as `python -c`: the parent's `sys.path` is there before anything is imported.
BOOTSTRAP = """\
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from fedlpp_hf.processes.child import main
main(int(sys.argv[1]))
"""


def main(descriptor: int) -> None:
    """Serve the parent at the other end of the socket `descriptor`."""
    # ^C reaches the whole process group; the parent decides what it means and then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for variable in _LAUNCHER_VARIABLES:
        os.environ.pop(variable, None)
    pipe = Connection(descriptor)
    try:
        name, make_handler, setup = pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send_bytes(json.dumps(f"{type(error).__name__}: {error}").encode())
        return
    pipe.send_bytes(b"null")
    with temporary_directory(scratch_prefix(name)) as scratch:
        handler = make_handler(setup, scratch)
        del setup
        while answer_request(pipe, handler):
            pass


def scratch_prefix(name: str) -> str:
    """How the names of directories begin that processes called `name` work in."""
    return f"fedlpp-{name.replace(' ', '-')}-"


def answer_request(pipe: Connection, handler: Any) -> bool:
    """Answer one request by the handler's method that it names; False when the parent is gone."""
    try:
        request, payload = decode_message("request", pipe.recv_bytes())
    except (EOFError, OSError):
        return False
    answer: dict[str, Any] = {}
    tensors: Mapping[str, torch.Tensor] = {}
    error = None
    try:
        answer, tensors = getattr(handler, request["command"])(payload, **request["arguments"])
    except Exception as exception:
        sys.excepthook(type(exception), exception, exception.__traceback__)
        # Its kind alone crosses over, and a library's own kind of ValueError is one.
        kind = "ValueError" if isinstance(exception, ValueError) else type(exception).__name__
        error = [kind, f"{type(exception).__name__}: {exception}"]
    pipe.send_bytes(encode_message("answer", {"answer": answer, "error": error}, tensors))
    return True
