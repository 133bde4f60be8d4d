"""Where the implementations of a mixer's ops are, and which of them runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
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


def in_states_dtype(mixer: Mixer, arguments: Iterable[str]) -> Callable[[Sequence[Any], torch.dtype], list[Any]]:
    """Of an op of these arguments: states, and what is declared to be like them, in a dtype; the others as they are."""
    names = {"initial_state", "dfinal_state", *mixer.in_state_dtype}
    places = [n for n, name in enumerate(arguments) if name in names]

    def converted(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
        given = list(args)
        for n in places:
            if given[n] is not None:
                given[n] = given[n].to(dtype)
        return given

    return converted


def _load(folder: str, choice: str) -> Any:
    if choice == "cpu":
        others = ("summary", "adjoint", "enter", "leave")
        ops = {"forward": folder, "backward": f"{folder}_bwd", **{what: f"{folder}_{what}" for what in others}}
        cpu = torch.ops.packc_cpu
        return SimpleNamespace(**{what: getattr(cpu, op).default for what, op in ops.items() if hasattr(cpu, op)})
    return importlib.import_module(f"packc.ops.{folder}.{'triton_op' if choice == 'triton' else choice}")
