# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Work that is done again and again beside a block of code."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeating(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Meanwhile, call `action` in a thread: at once, then `seconds` after each call.

    The end of the block waits for a call that is under way. An error of `action` ends the thread, and not the block.
    """
    over = threading.Event()

    def repeat() -> None:
        while True:
            action()
            if over.wait(seconds):
                return

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
