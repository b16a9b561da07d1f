# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Clients side by side: processes that each hold the base and train one client at a time."""

import contextlib
import gc
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..client.guard import BaseMovedError
from ..client.partition import count_rows
from ..wire.messages import ClientFailure, ClientTask, ClientUpdate
from .blueprint import TrainerBlueprint
from .service import Service


logger = logging.get_logger(__name__)

# What a worker has for loading the base: `round_timeout`, but at least five minutes, and half an hour where it is not set.
_START_SECONDS, _LEAST_START_SECONDS = 1800.0, 300.0


class ClientWorkers:
    """`count` processes that share the clients of each round, for simulations on one machine.

    A client's update depends on its task and rows alone, so that any number of workers ends in the same bits as one
    (given equal threads: `threads` of each worker, by default the cores shared out evenly). Where there are several GPUs,
    each worker has one, in turn. A worker that dies is replaced, and its client counts as failed; so do all that have not
    answered when a round's `round_timeout` is over. One that dies or hangs while it starts is given up, and the others do its
    work.

    Args:
        blueprint: Of the trainer that each worker builds.
        count: Workers.
        threads: Threads of each worker.
        on_begin: Called with the id of each client whose run begins.

    Raises:
        ValueError: from [`train_clients`], if the trainer that a worker builds is refused.
        RuntimeError: from [`train_clients`], if no worker is left.
    """

    def __init__(
        self,
        blueprint: TrainerBlueprint,
        count: int,
        threads: int | None = None,
        on_begin: Callable[[str], None] | None = None,
    ):
        self.blueprint = blueprint
        self.round_timeout = blueprint.args.round_timeout or math.inf
        self._start_timeout = max(blueprint.args.round_timeout or _START_SECONDS, _LEAST_START_SECONDS)
        self.threads = threads or max((os.cpu_count() or 1) // count, 1)
        self.on_begin = on_begin
        # A stream's rows are not known: it may take as long as any.
        self.num_examples = {
            client: math.inf if count is None else count
            for client, count in count_rows(blueprint.client_datasets).items()
        }
        self._starting: dict[Service, float] = {}  # when each is given up
        self._idle: list[Service] = []
        self._busy: dict[Service, str] = {}  # the client that it trains
        for environment in share_gpus(count):
            self._start(environment)

    def train_clients(self, tasks: list[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """An answer to each of `tasks`, as they come; the clients with most rows begin, because they take longest."""
        waiting = sorted(tasks, key=lambda task: self.num_examples[task.client_id])
        while self._starting:  # loading the base is no part of a round's time
            yield from self._answers(math.inf)
        deadline = time.monotonic() + self.round_timeout
        try:
            while waiting or self._busy:
                if time.monotonic() > deadline:
                    late = [*self._busy.values(), *(task.client_id for task in waiting)]
                    yield from (ClientFailure(client, late_reason(self.round_timeout)) for client in late)
                    return
                while waiting and self._idle:
                    worker, task = self._idle.pop(), waiting.pop()
                    self._busy[worker] = task.client_id
                    if self.on_begin is not None:
                        self.on_begin(task.client_id)
                    try:
                        worker.send("train", {"task": as_tensor(task.to_bytes())})
                    except RuntimeError as error:  # it died since its last answer
                        self._replace(worker)
                        yield ClientFailure(task.client_id, str(error))
                if self._busy or self._starting:
                    yield from self._answers(deadline)
        finally:
            # A round that closes early leaves runs behind that nobody asks for; the next one must not get their answers.
            for worker in list(self._busy):
                self._replace(worker)

    def close(self) -> None:
        """End all processes."""
        for worker in self._busy:
            worker.kill()
        for worker in (*self._idle, *self._starting):
            worker.close()
        self._idle.clear()
        self._busy.clear()
        self._starting.clear()

    def _answers(self, deadline: float) -> Iterator[ClientUpdate | ClientFailure]:
        left = max(min(deadline, *self._starting.values(), math.inf) - time.monotonic(), 0.0)
        pipes = [worker.pipe for worker in (*self._busy, *self._starting)]
        ready = wait(pipes, None if math.isinf(left) else left)
        for worker in list(self._starting):
            if worker.pipe in ready or self._starting[worker] < time.monotonic():
                self._finish_start(worker)
        for worker, client in [(worker, self._busy[worker]) for worker in self._busy if worker.pipe in ready]:
            try:
                answer, payload = worker.receive()
                reason = answer.get("reason")
            except (ValueError, RuntimeError) as error:  # the process died, or its answer can't be read
                answer, reason = {}, str(error)
            if answer.get("base_moved"):
                raise BaseMovedError(reason)
            if reason is not None:
                self._replace(worker)
                yield ClientFailure(client, reason)
                continue
            del self._busy[worker]
            self._idle.append(worker)
            yield ClientUpdate.from_bytes(as_bytes(payload["update"]))

    def _replace(self, worker: Service) -> None:
        del self._busy[worker]
        worker.kill()
        self._start(worker.environment)

    def _start(self, environment: Mapping[str, str]) -> None:
        worker = Service("client worker", make_handler, (self.blueprint, self.threads), environment)
        with contextlib.suppress(RuntimeError):  # it died at once, which its answer tells
            worker.send("start")
        self._starting[worker] = time.monotonic() + self._start_timeout

    def _finish_start(self, worker: Service) -> None:
        """Take a worker that has started, or give up one that died or hangs, unless it is the last."""
        del self._starting[worker]
        try:
            if not worker.pipe.poll(0):
                raise RuntimeError(f"A client worker had not started after {self._start_timeout:g} seconds.")
            worker.receive()
            self._idle.append(worker)
        except Exception as error:
            worker.kill()
            left = len(self._idle) + len(self._busy) + len(self._starting)
            if not left or not isinstance(error, RuntimeError):  # what one refuses, all do
                raise
            logger.warning(f"{error} Given up; workers left: {left}.")


class WorkerHandler:
    """One method for each request to a worker, which returns (JSON values, tensors)."""

    def __init__(self, blueprint: TrainerBlueprint):
        # What compression left of an update is in files under output_dir, where the next worker finds it.
        self.trainer = blueprint.build(blueprint.client_datasets, Path(blueprint.args.output_dir), blueprint.base_dir)
        gc.collect()
        gc.freeze()

    def start(self, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return {}, {}

    def train(self, tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        try:
            update = self.trainer.train_client(ClientTask.from_bytes(as_bytes(tensors["task"])))
        except Exception as error:
            traceback.print_exc()
            moved = isinstance(error, BaseMovedError)
            return {"reason": str(error) if moved else failure_reason(error), "base_moved": moved}, {}
        return {}, {"update": as_tensor(update.to_bytes())}


def make_handler(setup: tuple[TrainerBlueprint, int], scratch: Path) -> WorkerHandler:
    """What a worker's process runs."""
    blueprint, threads = setup
    torch.set_num_threads(threads)
    return WorkerHandler(blueprint)


def share_gpus(count: int) -> list[dict[str, str]]:
    """The environments of `count` processes that share this machine's GPUs, one each, in turn; empty where there is no choice."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return [{} for _ in range(count)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(gpu) for gpu in range(gpus)]
    return [{"CUDA_VISIBLE_DEVICES": names[index % gpus].strip()} for index in range(count)]


def failure_reason(error: Exception) -> str:
    """Why a client whose run raised has no part in a round."""
    return f"its run failed: {type(error).__name__}: {error}"


def late_reason(round_timeout: float) -> str:
    """Why a client has no part in a round that closed without it."""
    return f"it had not answered within round_timeout={round_timeout:g} seconds"


def as_tensor(data: bytes) -> torch.Tensor:
    """Bytes `(n,)` uint8, so that a message can travel in another."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def as_bytes(tensor: Any) -> bytes:
    """The inverse of [`as_tensor`]."""
    return tensor.numpy().tobytes()
