"""A child process in a group of its own, read line by line, that ends when its time is up, whatever it does."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

MARK = "PACKC_GPU_CHILD"  # in the environment of a child and of all that it starts, in whatever session
GRACE = 2.0  # seconds between asking a group to end and ending it
LONGEST_LINE = 1 << 16  # bytes; what a line has beyond is a line of its own


_number = itertools.count()


class Ending(NamedTuple):
    how: str  # "done", or what went wrong
    seconds: float


def adopt_orphans() -> None:
    """What a child has started and left becomes a child of this process, which can then see it end (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    limit: float,
    quiet: float,
    on_line: Callable[[str], None],
    on_error: Callable[[str], None],
) -> Ending:
    """Runs until the child ends, ``limit`` seconds are over, or it has said nothing for ``quiet`` seconds.

    Nothing that it has started is left behind, unless the system cannot end it, which the ending says.
    """
    began = last = time.monotonic()
    mark = f"{os.environ.get(MARK, '')}/{os.getpid()}.{next(_number)}"
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**environment, MARK: mark}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return Ending(f"did not start: {error}", 0.0)
    assert child.stdout is not None
    assert child.stderr is not None
    lines = _Lines({child.stdout: on_line, child.stderr: on_error})
    how = None
    try:
        while child.poll() is None:
            now = time.monotonic()
            if now - began >= limit:
                how = f"stopped after its {limit:.0f} s"
            elif now - last >= quiet:
                how = f"stopped: silent for {quiet:.0f} s"
            if how is not None:
                break
            if lines.read(min(0.2, max(began + limit - now, 0.0))):
                last = time.monotonic()
    finally:
        died = _end(child, mark)
        lines.finish()
    if how is None:
        how = _told(child.returncode)
    return Ending(how if died else f"{how}; it would not die", time.monotonic() - began)


def _told(code: int) -> str:
    if code == 0:
        return "done"
    return f"crashed: {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _end(child: subprocess.Popen, mark: str) -> bool:
    """Also what it has started and not waited for."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, sign)
        ends = time.monotonic() + GRACE
        while time.monotonic() < ends and _group_lives(child):
            time.sleep(0.01)
        if not _group_lives(child):
            break
    for pid in _marked(mark):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return child.poll() is not None


def _marked(mark: str) -> list[int]:
    """Processes in sessions of their own too, as /proc tells of them (Linux)."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if any(x == wanted or x.startswith(wanted + b"/") for x in file.read_bytes().split(b"\0")):
                found.append(int(file.parent.name))
    return found


def _group_lives(child: subprocess.Popen) -> bool:
    child.poll()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-child.pid, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(child.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


class _Lines:
    """Bytes of several pipes, handed on as whole lines; pipes that others hold open are no reason to wait."""

    def __init__(self, handlers: dict[IO[bytes], Callable[[str], None]]) -> None:
        self.selector = selectors.DefaultSelector()
        self.rest: dict[IO[bytes], bytes] = dict.fromkeys(handlers, b"")
        self.handlers = handlers
        for pipe in handlers:
            os.set_blocking(pipe.fileno(), False)
            self.selector.register(pipe, selectors.EVENT_READ)

    def read(self, wait: float) -> bool:
        """Whether anything came."""
        if not self.selector.get_map():
            time.sleep(min(wait, 0.05))
            return False
        came = False
        for key, _ in self.selector.select(wait):
            pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]
            data = os.read(pipe.fileno(), LONGEST_LINE)
            if not data:
                self.selector.unregister(pipe)
                continue
            came = True
            *whole, rest = (self.rest[pipe] + data).split(b"\n")
            if len(rest) >= LONGEST_LINE:
                whole, rest = [*whole, rest], b""
            self.rest[pipe] = rest
            for line in whole:
                self._hand_on(pipe, line)
        return came

    def finish(self) -> None:
        deadline = time.monotonic() + GRACE  # of a pipe that is held open and written to for ever
        while time.monotonic() < deadline and self.read(0.0):
            pass
        for pipe, rest in self.rest.items():
            if rest:
                self._hand_on(pipe, rest)
            pipe.close()
        self.selector.close()

    def _hand_on(self, pipe: IO[bytes], line: bytes) -> None:
        self.handlers[pipe](line.decode(errors="replace"))
