# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Work beside a block begins at once, is repeated, and is over when the block is."""

import threading

import pytest

from fedlpp_hf.flower.repeating import repeating


def test_repeated_until_the_end_of_the_block():
    calls, threads = threading.Semaphore(0), []

    def act():
        threads.append(threading.current_thread())
        calls.release()

    with repeating(act, 0.01):
        assert all(calls.acquire(timeout=10) for _ in range(3))
    with repeating(act, 1000.0):  # the end cuts the waiting short
        pass
    assert len(threads) >= 4 and not any(thread.is_alive() for thread in threads)


def test_the_end_waits_for_a_call():
    begun, go_on, done = threading.Event(), threading.Event(), []

    def act():
        begun.set()
        go_on.wait(10)
        done.append(True)

    with repeating(act, 0.01):
        assert begun.wait(10)
        threading.Timer(0.1, go_on.set).start()
    assert done


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_ends_the_repeating_alone():
    calls = []

    def act():
        calls.append(None)
        raise ZeroDivisionError

    with repeating(act, 0.0):
        while not calls:
            pass
    with pytest.raises(KeyError), repeating(lambda: None, 0.01):
        raise KeyError
    assert len(calls) == 1
