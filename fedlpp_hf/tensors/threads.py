# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Tensors worked on by threads, side by side and in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch


Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def tensor_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use for one operation, each of which runs its operations alone."""
    threads = torch.get_num_threads()
    try:
        # Teams of threads under each of these would wait for each other, spinning.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)  # the count is the thread's own, but also what later threads start with


def map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`map(function, items)` by the threads of `pool`, which has at most one item more than threads in hand: whatever the
    number of items, the memory is that of a few."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > pool._max_workers:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
