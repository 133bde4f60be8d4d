"""What ``ops.py`` times of summaries: the walks of states alone beside the ops that they come in addition to.

Over one document, as if a rank of a sequence lay wholly inside of it: the most that passing states on may cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from op_contenders import Contender, Problem
from torch import Tensor

from packc.ops.mixer import MIXERS

HEAD = 64  # channels


def walks(name: str, make: Callable[[Problem], dict[str, Any]]) -> Callable[[Problem], dict[str, Contender]]:
    mixer = MIXERS[name]
    summary = mixer.summary
    assert summary is not None

    def section(p: Problem) -> dict[str, Contender]:
        def places(**at: int) -> dict[str, Tensor]:
            return {place: torch.tensor([token], device=p.device) for place, token in at.items()}

        given = make(p) | dict.fromkeys(("cu_seqlens", "initial_state", "dfinal_state")) | places(begin=0, end=p.tokens)
        given |= {"output_final_state": False, **{f"channel_first_d{each}": False for each in mixer.own_layout}}

        def call(suffix: str, arguments: dict[str, str]) -> Callable[[], Any]:
            op, values = getattr(torch.ops.packc, name + suffix), [given[argument] for argument in arguments]
            return lambda: op(*values)

        forward = call("", mixer.arguments)
        given |= dict(zip(mixer.results, forward(), strict=True))
        given["dout"] = torch.randn_like(given["out"])
        return {
            "forward": Contender(forward),
            "summary": Contender(call("_summary", mixer.summary_arguments)),
            "backward": Contender(call("_bwd", mixer.backward_arguments)),
            "adjoint": Contender(call("_adjoint", mixer.adjoint_arguments)),
        }

    return section


def linear_attention(p: Problem) -> dict[str, Any]:
    H = max(p.channels // HEAD, 1)
    tokens = {name: p.random(1, p.tokens, H, HEAD) for name in ("q", "k", "v")}
    return {**tokens, "g": -torch.rand(1, p.tokens, H, device=p.device) * 0.1, "scale": HEAD**-0.5}


def ssd(p: Problem) -> dict[str, Any]:
    H, T = max(p.channels // HEAD, 1), p.tokens
    dt, A = torch.rand(1, T, H, device=p.device) * 0.1, -torch.rand(H, device=p.device)
    B, C = p.random(1, T, 1, HEAD), p.random(1, T, 1, HEAD)
    x, z = p.random(1, T, H, HEAD), p.random(1, T, H, HEAD)
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": torch.ones(H, device=p.device), "z": z}


def selective_scan(p: Problem) -> dict[str, Any]:
    N, T, D = 16, p.tokens, p.channels
    return {
        **{name: p.random(1, T, D) for name in ("u", "delta", "z")},
        "A": -torch.arange(1, N + 1, device=p.device).float().repeat(D, 1),
        **{name: p.random(1, T, N) for name in ("B", "C")},
        "D": torch.ones(D, device=p.device),
        "delta_bias": torch.randn(D, device=p.device) - 4,
        "delta_softplus": True,
    }


def linear_scan(p: Problem) -> dict[str, Any]:
    return {"a": torch.sigmoid(p.random(1, p.tokens, p.channels) + 2), "b": p.random(1, p.tokens, p.channels)}


def gated_delta_rule(p: Problem) -> dict[str, Any]:
    inputs = linear_attention(p)
    beta = torch.rand_like(inputs["g"])
    return {**inputs, "k": F.normalize(inputs["k"], dim=-1), "beta": beta}


MAKERS = (linear_attention, ssd, selective_scan, linear_scan, gated_delta_rule)
SECTIONS = {f"{make.__name__}_states": walks(make.__name__, make) for make in MAKERS}
