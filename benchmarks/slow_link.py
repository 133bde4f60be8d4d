"""gloo with a slow link: every collective takes so much longer, while its rank goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_Work: Any = dist._Work


class _Later(_Work):
    """A collective of another group, begun at once and done ``latency`` seconds after its end."""

    def __init__(self, begin: Callable[[], Any], latency: float, waited: Callable[[float], None]) -> None:
        super().__init__()
        self._error: Exception | None = None
        self._waited = waited
        work = begin()  # here, for collectives must begin in one order on all ranks

        def run() -> None:
            try:
                work.wait()
                time.sleep(latency)
            except Exception as error:  # raised where it is waited for
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def wait(self, timeout: Any = None) -> bool:
        began = time.perf_counter()
        self._thread.join()
        self._waited(time.perf_counter() - began)
        if self._error is not None:
            raise self._error
        return True


class SlowGroup(dist.ProcessGroup):
    def __init__(self, inner: Any, latency: float) -> None:
        super().__init__(inner.rank(), inner.size())
        self.inner, self.latency = inner, latency
        self.waited = 0.0
        """Seconds that this rank has stood waiting for collectives."""
        self._name = ""

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:  # called by torch as it makes a group
        self._name = name

    def _later(self, name: str, *args: Any) -> _Later:
        return _Later(lambda: getattr(self.inner, name)(*args), self.latency, self._add)

    def _add(self, seconds: float) -> None:
        self.waited += seconds

    def allgather(self, *args: Any) -> _Later:
        return self._later("allgather", *args)

    def allgather_into_tensor_coalesced(self, *args: Any) -> _Later:
        return self._later("allgather_into_tensor_coalesced", *args)

    def allreduce(self, *args: Any) -> _Later:
        return self._later("allreduce", *args)

    def allreduce_coalesced(self, *args: Any) -> _Later:
        return self._later("allreduce_coalesced", *args)

    def reduce_scatter_tensor_coalesced(self, *args: Any) -> _Later:
        return self._later("reduce_scatter_tensor_coalesced", *args)

    def alltoall_base(self, *args: Any) -> _Later:
        return self._later("alltoall_base", *args)

    def broadcast(self, *args: Any) -> _Later:
        return self._later("broadcast", *args)

    def barrier(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.barrier(*args, **kwargs)  # what measures waits for it

    def getBackendName(self) -> str:
        return "slow"


def register(latency: float) -> None:
    """The backend ``"slow"`` of ``torch.distributed.init_process_group``, with ``latency`` seconds a collective."""

    def create(store: Any, rank: int, size: int, timeout: Any) -> SlowGroup:
        gloo = dist.ProcessGroup(store, rank, size)
        kind = dist.ProcessGroup.BackendType.GLOO
        gloo._register_backend(torch.device("cpu"), kind, dist.ProcessGroupGloo(store, rank, size, timeout))
        gloo._set_default_backend(kind)
        return SlowGroup(gloo, latency)

    dist.Backend.register_backend("slow", create, devices=["cpu"])
