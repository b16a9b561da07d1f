# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Threads that work on tensors side by side, with results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch


Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def tensor_threads(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Start `count` threads, by default as many as torch uses for one operation; each runs its operations alone."""
    before = torch.get_num_threads()
    try:
        # Teams of threads under each of these would wait for each other, spinning.
        with ThreadPoolExecutor(count or before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)  # the count is per thread, but later threads start with the last one set


def map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], limit: int | None = None
) -> Iterator[Result]:
    """Call a function on each item, on several threads, and yield the results in order.

    When an item fails, or the caller stops early, no thread works on the others any more.

    Args:
        pool: the threads.
        function: called with one item.
        items: taken one by one.
        limit: items in hand at a time; by default one more than there are threads, so that memory does not grow with the
            number of items.
    """
    limit = limit or pool._max_workers + 1
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= limit:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)
