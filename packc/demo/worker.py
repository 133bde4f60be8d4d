"""A contender in a process of its own: trains a stock model, one step a request.

Run by path (see contender.py), because importing it from packc would bring packc into the stock contenders. A job is
a file from ``torch.save``: the model, its configuration and first weights, the batches, backend and learning rate.
Requests come on stdin and replies go to stdout, a JSON object a line: ``{"batch": i}`` makes a training step, of
which the first begins with ``torch.compile``; ``{"restart": true}`` goes back to the first weights.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if path != HERE]  # files beside this one must not pass for libraries

import torch  # noqa: E402
import transformers  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable


class Training:
    """A stock model and its optimizer, in eager or behind a backend of ``torch.compile``."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        kind = getattr(transformers, job["model"])
        named = job["config_class"]
        config = getattr(transformers, named) if named is not None else kind.config_class
        self.model = kind(config(**job["config"])).train()
        self.forward: Callable[..., Any] = self.model
        self.preparing = 0.0
        if job["backend"] != "eager":
            start = perf_counter()
            self.forward = torch.compile(self.model, backend=job["backend"])
            self.preparing = perf_counter() - start
        self.restart()

    def restart(self) -> None:
        self.model.load_state_dict(self.job["weights"])
        rate = self.job["learning_rate"]
        self.optimizer = None if rate is None else torch.optim.AdamW(self.model.parameters(), lr=rate)

    def step(self, number: int) -> dict[str, Any]:
        batch = self.job["batches"][number]
        start = perf_counter()
        loss = self.forward(**batch).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        # Stock imports Inductor in `torch.compile`, packc imports itself there, and Inductor when it first compiles.
        seconds, self.preparing = self.preparing + perf_counter() - start, 0.0
        self.model.zero_grad()
        if self.job["backend"] != "packc" and "packc" in sys.modules:
            raise RuntimeError("packc was imported into the process of a stock contender")
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if self.forward is not self.model else 0
        return {"seconds": seconds, "loss": loss.item(), "peak_mib": peak_mib(), "graphs": graphs}


def peak_mib() -> float:
    """Most memory this process has had resident since the last call; since its start where the system cannot tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        per_mib = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mib
    # Not ru_maxrss: a process inherits its parent's.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    clear.write_text("5")  # resets VmHWM
    return int(line.split()[1]) / 2**10


def serve(job: dict[str, Any], requests: TextIO, replies: TextIO) -> None:
    training = Training(job)
    _reply(replies, {"threads": torch.get_num_threads()})
    for line in requests:
        request = json.loads(line)
        if request.get("restart"):
            training.restart()
            _reply(replies, {})
        else:
            _reply(replies, training.step(request["batch"]))


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up among the replies
    serve(torch.load(sys.argv[1]), sys.stdin, channel)
