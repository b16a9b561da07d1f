# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A federation while it runs: what the owner may see of it, and how the owner steers it.

The thread that runs the rounds tells what happens, and waits here while the federation is paused; commands come in other threads.
"""

import contextlib
import logging
import os
import platform
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from ..config.federated import FederatedConfig
from ..processes.control import answer_commands
from ..processes.monitor import serve_monitor
from ..report.exposition import render_metrics
from ..report.json_log import log_to_file
from ..report.status import summarize_status
from ..server.dropping import check_dropped
from ..server.loop import FederatedServer
from ..server.store import RoundStore
from ..wire.messages import ClientTask


_TICK_SECONDS = 0.5  # of a pause
_ROUNDS_TIMED = 5  # whose times the next one is expected from

logger = logging.getLogger(__name__)


class Steering:
    """Answers `status`, and carries out `stop`, `pause`, `resume` and `drop`, for one trainer.

    Args:
        args: The federation's options.
    """

    def __init__(self, args: FederatedConfig):
        self.args = args
        self.store = RoundStore(args.output_dir)
        self._change = threading.Condition()
        self._listening = False
        self._find_network: Callable[[], Mapping[str, Any]] | None = None
        self._attend: Callable[[], None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._since = datetime.now().astimezone().isoformat(timespec="seconds")
        self._loop = threading.current_thread()
        self.server: FederatedServer | None = None
        self.records: list[dict[str, Any]] = []
        self._phase, self._number = "starting", 0
        self._pausing = self._stopping = self._begun = False
        self._durations: deque[float] = deque(maxlen=_ROUNDS_TIMED)
        self._round_began: float | None = None
        self._asked: dict[str, float] = {}  # client → when it was asked, or when its run began
        self._waiting: set[str] = set()  # whose run on this machine has not begun
        self._answered: dict[str, float] = {}  # client → seconds

    @contextlib.contextmanager
    def listen(
        self,
        find_network: Callable[[], Mapping[str, Any]] | None = None,
        attend: Callable[[], None] | None = None,
    ) -> Iterator[None]:
        """Take commands meanwhile, and keep the monitor and the log that were asked for. Within itself it changes nothing.

        Args:
            find_network: Which clients are connected (`here`), and which nodes are refused (`refused_nodes`: reasons).
            attend: Called now and then while the federation is paused, in the thread of the rounds.

        Raises:
            ValueError: if another process runs a federation here, or the monitor's port or the log's file is taken.
        """
        if self._listening:
            yield
            return
        self._reset()
        self._find_network, self._attend = find_network, attend
        if find_network is not None:
            self._phase = "joining"
        with contextlib.ExitStack() as stack:
            stack.enter_context(answer_commands(self.store.root, self.handle))
            if self.args.log_json is not None:
                stack.enter_context(log_to_file(self.args.log_json, self.args))
            if self.args.monitor_port is not None:
                stack.enter_context(serve_monitor(self.args.monitor_port, self.describe_health, self.render_metrics))
            self._listening = True
            try:
                yield
            except BaseException as error:
                # For the file of `log_json`; whoever runs the process sees the error itself.
                logger.info(f"The run ends early: {type(error).__name__}: {error}", exc_info=True)
                raise
            finally:
                self._listening = False

    # --- What happens, told by the thread that runs the rounds.
    def follow(self, server: FederatedServer, resume: bool) -> None:
        """The rounds of `server` are about to begin."""
        with self._change:
            self.server, self._phase = server, "starting"
            self.records = self.store.records() if resume else []
        server.is_over = self.is_over

    def is_over(self, number: int) -> bool:
        """Whether the owner has stopped the federation before the round `number`; waits while it is paused."""
        self._end_round()
        while True:
            with self._change:
                self._number = number
                if self._stopping:
                    self._phase = "finishing"
                    return True
                if not self._pausing:
                    self._phase, self._begun, self._round_began = "round", True, time.monotonic()
                    return False
                self._phase = "paused"
                self._change.wait(_TICK_SECONDS)
            if self._attend is not None:
                self._attend()

    def begin_round(self, tasks: Sequence[ClientTask]) -> None:
        """The tasks go out."""
        now = time.monotonic()
        with self._change:
            self._asked = {task.client_id: now for task in tasks}
            # Over a network all run at once; here, from the moment that `begin_client` tells.
            self._waiting = set(self._asked) if self._find_network is None else set()
            self._answered = {}

    def begin_client(self, client_id: str) -> None:
        """A client's run begins on this machine."""
        if self.server is not None:
            self.server.admission.begin(client_id)
        with self._change:
            self._asked[client_id] = time.monotonic()
            self._waiting.discard(client_id)

    def end_client(self, client_id: str) -> None:
        """A client has answered, with an update or without one."""
        with self._change:
            if client_id in self._asked:
                self._answered.setdefault(client_id, time.monotonic() - self._asked[client_id])

    def on_round(self, record: dict[str, Any]) -> None:
        """A round is committed."""
        with self._change:
            self.records.append(record)
        if record["round"]:
            logger.info(
                f"Round {record['round']} is committed: {len(record['clients'])} updates, {len(record['rejected'])} refused"
            )
        for client, reason in record["rejected"].items():
            logger.info(f"Round {record['round']}: client {client!r} was refused: {reason}")

    def finish(self) -> None:
        """The rounds are over; what follows is the merge, the audit and the report."""
        self._end_round()
        with self._change:
            self._phase = "finishing"

    def _end_round(self) -> None:
        with self._change:
            if self._round_began is not None:
                self._durations.append(time.monotonic() - self._round_began)
            self._round_began, self._asked, self._waiting, self._answered = None, {}, set(), {}

    # --- Commands, in threads of their own.
    def handle(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Carry out a command and return what there is to say.

        Raises:
            ValueError: if it is unknown, or can't be carried out now; says why.
        """
        command = request.get("command")
        commands = {"status": self.describe, "stop": self.stop, "pause": self.pause, "resume": self.resume}
        if command == "drop":
            client, undo = request.get("client"), request.get("undo", False)
            if not isinstance(client, str) or not isinstance(undo, bool):
                raise ValueError("`drop` needs a `client`, which is text, and perhaps `undo`, true or false.")
            return self.drop(client, undo)
        if not isinstance(command, str) or command not in commands:
            raise ValueError(f"{command!r:.40} is no command; expected drop, {', '.join(commands)}.")
        answer = commands[command]()
        if command != "status":
            logger.warning(f"The owner's command: {command}")
        return answer

    def stop(self) -> dict[str, Any]:
        """Make the round under way the last one of this run."""
        with self._change:
            self._check_rounds_left()
            if not self._begun:
                raise ValueError(
                    "No round of this run has begun. End the process (^C, `systemctl stop`): nothing is lost by it."
                )
            self._stopping = True
            self._change.notify_all()
            return {"round": self._number if self._phase == "round" else self._number - 1}

    def pause(self) -> dict[str, Any]:
        """Wait before the next round, until `resume`."""
        with self._change:
            self._check_rounds_left()
            if self.args.world_size > 1:
                raise ValueError(
                    f"This launch has {self.args.world_size} processes, which wait for each other for no longer than "
                    f"ddp_timeout={self.args.ddp_timeout} s. Use `fedlpp-hf stop`, and resume the federation later."
                )
            if self._phase == "round" and self._number == self.args.num_rounds:
                raise ValueError(f"Round {self._number} is the last one; there is nothing to pause before.")
            self._pausing = True
            return {"round": self._number if self._phase == "round" else None}

    def resume(self) -> dict[str, Any]:
        """Go on after `pause`."""
        with self._change:
            if not self._pausing:
                raise ValueError("The federation is not paused.")
            self._pausing = False
            self._change.notify_all()
            return {"round": self._number or None}

    def drop(self, client: str, undo: bool) -> dict[str, Any]:
        """Do not ask a client any more, from the next round on, or ask it again. Kept on disk for whoever resumes."""
        with self._change:
            if self.server is None or self._phase in ("joining", "starting"):
                raise ValueError(
                    "The rounds have not begun, and who takes part is not settled. Send `fedlpp-hf pause` now, drop the client, "
                    "and then `fedlpp-hf resume`; or leave its key out of --client_keys."
                )
            before = self.server.dropped
            if undo and client not in before:
                raise ValueError(
                    f"{client!r:.120} is not dropped; dropped are: {', '.join(sorted(before)) or 'none'}."
                )
            after = before - {client} if undo else before | {client}
            next_round = self._number + 1 if self._phase == "round" else self._number
            if not undo:
                check_dropped(self.args, list(self.server.num_examples), after, next_round)
            self.store.write_dropped(after)
            self.server.dropped = after
        logger.warning(f"The owner's command: {'take back' if undo else 'drop'} {client!r}")
        return {"dropped": sorted(after), "next_round": next_round}

    def _check_rounds_left(self) -> None:
        if self._phase == "finishing":
            raise ValueError("The rounds are over; the process merges, reports and ends by itself.")

    # --- What is seen.
    def describe(self) -> dict[str, Any]:
        """The run as plain values; [`summarize_status`] adds what the rounds' records say."""
        network = {} if self._find_network is None else self._find_network()
        with self._change:
            now = time.monotonic()
            server = self.server
            traffic, rejected = ({}, {}) if server is None else (server.admission.traffic, server.admission.rejected)
            asked: dict[str, dict[str, Any]] = {}
            for client, began in self._asked.items():
                seconds = self._answered.get(client, None if client in self._waiting else now - began)
                state = "queued" if client in self._waiting else "training"
                if client in self._answered:
                    state = "refused" if client in rejected else "answered"
                asked[client] = {"state": state, "seconds": seconds, "reason": rejected.get(client)}
                asked[client] |= {name: traffic.get(client, {}).get(name, 0) for name in ("bytes_down", "bytes_up")}
            return {
                "process": {"pid": os.getpid(), "host": platform.node(), "since": self._since},
                "phase": self._phase,
                "round": self._number if self._phase == "round" else None,
                "round_seconds": None if self._round_began is None else now - self._round_began,
                "usual_seconds": statistics.median(self._durations) if self._durations else None,
                "pausing": self._pausing,
                "stopping": self._stopping,
                "committed": None if self._phase in ("joining", "starting") else len(self.records) - 1,
                "num_rounds": self.args.num_rounds,
                "num_clients": self.args.num_clients,
                "rows": None if server is None else dict(server.num_examples),
                "dropped": [] if server is None else sorted(server.dropped),
                "asked": asked,
                "here": network.get("here"),
                "refused_nodes": network.get("refused_nodes", {}),
            }

    def describe_health(self) -> tuple[bool, str]:
        """Whether the thread that runs the rounds is alive, and what it is at."""
        return self._loop.is_alive(), self._phase

    def render_metrics(self) -> str:
        """The run in Prometheus' text format."""
        live = self.describe()
        with self._change:
            records = list(self.records)
        return render_metrics(summarize_status({}, records, live))
