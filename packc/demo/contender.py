"""Runs worker.py: the same training in another process, under a backend of its own."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""glibc's malloc keeps what is freed, for every contender: else each step would fault fresh pages in anew."""


class TimeLimit(Exception):
    """A contender did not finish in time; the message says what and how long."""


class Step(NamedTuple):
    """What a worker replies to a step."""

    seconds: float
    loss: float
    peak_mib: float
    graphs: int


@dataclass
class Job:
    """What every contender is given alike."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    batches: list[dict[str, Tensor]]
    learning_rate: float | None = None
    model: str = "MambaForCausalLM"
    """A class of transformers; ``config`` is for ``config_class``, by default the one that the model's names."""
    config_class: str | None = None


class Contender:
    """A worker process; ``with`` ends it.

    Args:
        job: model, first weights and data.
        backend: ``"eager"`` or a backend of ``torch.compile``.
        cache: Inductor's cache folder; a fresh one when None, so that the first step compiles everything.
        time_limit: seconds that any one step may take.
    """

    def __init__(self, job: Job, backend: str, *, cache: Path | None = None, time_limit: float = 600) -> None:
        self.backend = backend
        self.time_limit = time_limit
        self._folder = tempfile.TemporaryDirectory(prefix="packc-")
        folder = Path(self._folder.name)
        torch.save({**asdict(job), "backend": backend}, folder / "job.pt")
        environment = {**os.environ, **ALLOCATOR, "TORCHINDUCTOR_CACHE_DIR": str(cache or folder / "inductor")}
        self._errors = folder / "stderr"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder / "job.pt")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                start_new_session=True,  # so that its compiler processes can be ended with it
            )
        try:
            self.threads: int = self._receive()["threads"]
        except BaseException:
            self.close()
            raise

    def step(self, batch: int) -> Step:
        """One training step on a batch of the job.

        Raises:
            TimeLimit: it took too long; the process is no more.
        """
        return Step(**self._ask({"batch": batch}))

    def restart(self) -> None:
        """Back to the first weights."""
        self._ask({"restart": True})

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._folder.cleanup()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self.time_limit)
        if not ready:
            self.close()
            raise TimeLimit(f"{self.backend}: did not finish in {self.time_limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.backend} process failed:\n{self._errors.read_text()[-4000:]}")
        return json.loads(line)
