"""The order of collectives as a pass of Inductor's, which is slow to import."""

from __future__ import annotations

from pathlib import Path

from torch import fx

from packc.passes.overlap.hide_communication import hide_communication
from packc.private_torch import private_torch

with private_torch():
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class HideCommunication(CustomGraphPass):
    """For Inductor's ``post_grad_custom_post_pass``."""

    def __call__(self, graph: fx.Graph) -> None:
        hide_communication(graph)

    def uuid(self) -> bytes:
        return get_hash_for_files(tuple(map(str, sorted(Path(__file__).parent.glob("*.py")))))
