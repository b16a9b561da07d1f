# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""How long a SuperNode waits before it looks again: for a message, and for its ClientApp's answer.

Flower waits for three seconds after it found no message, and for half a second after it found no answer. In a federation of short
rounds, that is most of a round. Both waits are made here instead, until Flower's own are short beside what has passed.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar


FLOWER_PAUSE = 3.0  # seconds between a SuperNode's questions for a message, fixed in Flower
_LEAST_PAUSE = 0.1
_ANSWER_PAUSE = 0.05
_ANSWER_SECONDS = 10.0  # then half a second is short

T = TypeVar("T")


class Inquirer:
    """Asks a server for messages: often after the last one, ever more rarely later.

    The pause between two questions is a tenth of the wait so far. It is never less than ten times what the last question took: a
    server that has many clients, or is far away, or busy, is asked less often.

    Args:
        clock: of seconds.
        sleep: for seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep):
        self._clock, self._sleep = clock, sleep
        self._since: float | None = None

    def ask(self, receive: Callable[[], T | None]) -> T | None:
        """The next message, or None once Flower's own pause is short enough.

        Args:
            receive: asks once, and returns None where there is no message.
        """
        while True:
            began = self._clock()
            self._since = began if self._since is None else self._since
            if (message := receive()) is not None:
                self._since = None
                return message
            now = self._clock()
            pause = max(_LEAST_PAUSE, (now - self._since) / 10, (now - began) * 10)
            if pause >= FLOWER_PAUSE:
                return None
            self._sleep(pause)


def wait_for_answer(state: Any, patience: float = _ANSWER_SECONDS) -> None:
    """Wait until no ClientApp is at work any more, which has then left its whole answer; at most for `patience` seconds.

    Args:
        state: the SuperNode's.
        patience: after which Flower's own loop looks for the answer.
    """
    from flwr.common.constant import Status

    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and state.get_tasks(
        statuses=[Status.PENDING, Status.STARTING, Status.RUNNING], limit=1
    ):
        time.sleep(_ANSWER_PAUSE)
