# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""Kill some work up to three times in a forked child, finish it, and compare with work that nothing disturbed."""

import gc
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import KILLED, MODES, Faults


_FAILED = 3  # exit code of a child whose work raised


@dataclass(frozen=True)
class Case:
    """Work on files in one directory that can be begun again wherever it was stopped.

    Args:
        name: Of the work.
        work: Does it, or what is left of it. It is given the directory, and a function to call with the number of a step that
            is promised to be safe from now on.
        read: What came of it, by name; bits that must not differ.
        prepare: Makes what is there before; by default nothing.
        count_safe: The last step that is safe; by default there is one step, and `read` says whether it is.
    """

    name: str
    work: Callable[[Path, Callable[[int], None]], None]
    read: Callable[[Path], dict[str, Any]]
    prepare: Callable[[Path], None] = lambda directory: None
    count_safe: Callable[[Path], int] = lambda directory: 0


@dataclass
class Outcome:
    """What a trial found."""

    number: int
    case: str
    mode: str = ""
    at: list[int] = field(default_factory=list)
    kills: int = 0
    lost: int = 0
    differing: list[str] = field(default_factory=list)
    failed: str = ""
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.differing or self.failed or self.left)


class Trials:
    """Trials of a case, each in a copy of the directory that it starts from.

    Args:
        case: What is tried.
        root: A directory for all of them.
    """

    def __init__(self, case: Case, root: Path):
        self.case, self.root = case, root / case.name
        self.start, self.place = (
            self.root / "start",
            self.root / "work",
        )  # one place: paths may get into what is written
        self.start.mkdir(parents=True)
        case.prepare(self.start)
        gc.collect()
        gc.freeze()
        self._copy()
        code, _, message = self._fork(count_file=self.root / "count")
        if code:
            raise RuntimeError(f"{case.name} fails without a fault: {message}")
        self.operations = int((self.root / "count").read_text())
        self.expected, self.files = case.read(self.place), _list_files(self.place)

    def run(self, number: int, chance: random.Random) -> Outcome:
        """One trial: one to three faults in one mode, then the rest of the work without any."""
        began = time.perf_counter()
        outcome = Outcome(number, self.case.name, chance.choice(MODES))
        self._copy()
        promised = -1
        for _ in range(chance.choice((1, 1, 2, 3))):
            at = chance.randrange(self.operations)
            if outcome.mode == "cut" and chance.random() < 0.2:
                at = self.operations  # when all is done, and perhaps not on disk
            outcome.at.append(at)
            faults = Faults(self.place, at, outcome.mode, random.Random(chance.random()))
            code, promises, message = self._fork(faults)
            promised = max([promised, *promises])
            if (
                outcome.mode == "full"
                and code == _FAILED
                and not message.startswith(("OSError", "SafetensorError", "RuntimeError"))
            ):
                outcome.failed = f"a full disk was answered by {message}"
            elif code not in (0, KILLED) and not (outcome.mode == "full" and code == _FAILED):
                outcome.failed = message or f"exit code {code}"
            outcome.kills += code != 0
            outcome.lost = max(outcome.lost, promised - self._count_safe(outcome))
            if code == 0 or outcome.failed:
                break  # there was less left to do
        if not outcome.failed:
            code, _, message = self._fork()
            outcome.failed = message or f"exit code {code}" if code else ""
        if not outcome.failed:
            try:
                found = self.case.read(self.place)
            except Exception as error:
                found = {}
                outcome.failed = f"what came of it can't be read: {type(error).__name__}: {error}"
            outcome.differing = sorted(
                name for name in found.keys() | self.expected.keys() if found.get(name) != self.expected.get(name)
            )
            outcome.left = sorted(_list_files(self.place) ^ self.files)
        outcome.seconds = time.perf_counter() - began
        return outcome

    def _count_safe(self, outcome: Outcome) -> int:
        try:
            return self.case.count_safe(self.place)
        except Exception as error:
            outcome.failed = f"what is there can't be read: {type(error).__name__}: {error}"
            return -1

    def _copy(self) -> None:
        for directory in (self.place, Path(f"{self.place}.stash")):
            shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self.start, self.place)
        (self.place / "tmp").mkdir()

    def _fork(self, faults: Faults | None = None, count_file: Path | None = None) -> tuple[int, list[int], str]:
        """Exit code, promises, and the error in one line of a child that does the work."""
        ours, childs = os.pipe()
        pid = os.fork()
        if pid:
            os.close(childs)
            with open(ours, encoding="utf-8") as pipe:
                lines = pipe.read().splitlines()
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            messages = [json.loads(line) for line in lines]
            return (
                code,
                [m for m in messages if isinstance(m, int)],
                "".join(m for m in messages if isinstance(m, str)),
            )
        code = _FAILED
        try:
            os.close(ours)
            log = os.open(f"{self.place}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            tempfile.tempdir = str(self.place / "tmp")

            def say(message: int | str) -> None:
                os.write(childs, (json.dumps(message) + "\n").encode())

            if count_file is not None:
                faults = Faults(self.place, None)
            if faults is not None:
                faults.install()
            try:
                self.case.work(self.place, say)
                if count_file is not None and faults is not None:
                    count_file.write_text(str(faults.count))
                elif faults is not None:
                    faults.end()
                code = 0
            except Exception as error:
                traceback.print_exc()
                say(f"{type(error).__name__}: {error}"[:2000])
            sys.stderr.flush()
        finally:
            os._exit(code)


def _list_files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) + "/" * path.is_dir() for path in directory.rglob("*")}
