"""Where the implementations of a mixer's ops are, and which of them runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from packc.ops import dispatch
from packc.ops.mixer import Mixer


def implementations(mixer: Mixer) -> Callable[[torch.dtype, Tensor], Any]:
    """Which implementation runs, for the dtype of the states and a tensor ``like``. float64 is the reference's."""
    folder = mixer.kernels or mixer.name
    loaded: dict[str, Any] = {}

    def implementation(dtype: torch.dtype, like: Tensor) -> Any:
        choose = mixer.choose or dispatch.choose
        choice = "reference" if dtype is torch.float64 else choose(folder, like)
        if mixer.implementations is not None:
            return mixer.implementations[choice]
        if choice not in loaded:
            loaded[choice] = _load(folder, choice)
        return loaded[choice]

    return implementation


def _load(folder: str, choice: str) -> Any:
    if choice == "cpu":
        ops = {
            "forward": folder,
            "backward": f"{folder}_bwd",
            "summary": f"{folder}_summary",
            "adjoint": f"{folder}_adjoint",
        }
        cpu = torch.ops.packc_cpu
        return SimpleNamespace(**{what: getattr(cpu, op).default for what, op in ops.items() if hasattr(cpu, op)})
    return importlib.import_module(f"packc.ops.{folder}.{'triton_op' if choice == 'triton' else choice}")
