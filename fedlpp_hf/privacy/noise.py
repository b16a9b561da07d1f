# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Gaussian noise from the operating system's cryptographic randomness. There is no seed."""

import secrets
from collections.abc import Callable

import numpy as np


ReadBytes = Callable[[int], bytes]  # so many random bytes

_CHUNK = 2**16  # values at a time, so that memory stays small
_TERMS = 4


def draw_gaussian(count: int, read_bytes: ReadBytes = secrets.token_bytes) -> np.ndarray:
    """`(count,)` independent standard Gaussian numbers, float64.

    Box–Muller on uniform numbers of 52 random bits. Each number is the scaled sum of four, so that none can be told from the
    others by which float64 it is (arXiv 2107.10138, §4). A general-purpose generator would not do: NumPy's Mersenne Twister
    gives away its state after 624 outputs, and with a 32-bit seed all of the noise can be guessed.
    """
    values = np.empty(count)
    for start in range(0, count, _CHUNK):
        length = min(_CHUNK, count - start)
        terms = _draw_pairs(-(-length * _TERMS // 2), read_bytes)[: length * _TERMS].reshape(_TERMS, length)
        values[start : start + length] = terms.sum(0) / np.sqrt(_TERMS)
    return values


def draw_uniform(count: int, read_bytes: ReadBytes = secrets.token_bytes) -> np.ndarray:
    """`(count,)` independent uniform numbers in (0, 1), float64, with 52 random bits each: with more, some would round to 1."""
    integers = np.frombuffer(read_bytes(8 * count), "<u8") >> np.uint64(12)
    return (integers.astype(np.float64) + 0.5) / 2.0**52


def _draw_pairs(count: int, read_bytes: ReadBytes) -> np.ndarray:
    uniform = draw_uniform(2 * count, read_bytes)
    radius = np.sqrt(-2 * np.log(uniform[:count]))
    angle = 2 * np.pi * uniform[count:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
