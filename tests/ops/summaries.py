"""Every recurrence with a summary, as its ops take it, and sequences cut into segments: for tests of both."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mixers import MIXERS
from selective_scan_data import relative_error
from torch import Tensor

from packc.ops.mixer import MIXERS as DECLARATIONS
from packc.ops.mixer import Mixer
from packc.ops.summary import Summary


class Recurrence(NamedTuple):
    name: str
    make: Callable[[int], dict[str, Tensor | None]]  # of L: fp32 tensors of packc::<name>
    options: Mapping[str, Any] = MappingProxyType({})
    variant: bool = False  # of another, by the same kernels

    @property
    def mixer(self) -> Mixer:
        return DECLARATIONS[self.name]

    @property
    def summary(self) -> Summary:
        assert self.mixer.summary is not None
        return self.mixer.summary

    def call(
        self, tensors: Mapping[str, Tensor | None], cu_seqlens: Tensor | None, initial_state: Tensor | None
    ) -> Any:
        """``out`` and the final states of the op itself."""
        given = {**tensors, **self.options, "cu_seqlens": cu_seqlens, "initial_state": initial_state}
        op = getattr(torch.ops.packc, self.name)
        return op(*({**given, "output_final_state": True}[name] for name in self.mixer.arguments))[:2]

    def summarize(self, tensors: Mapping[str, Tensor | None], begin: int) -> tuple[Tensor, Tensor]:
        given = {**tensors, **self.options}
        op = getattr(torch.ops.packc, f"{self.name}_summary")
        return op(*(given[name] for name in self.summary.takes), torch.tensor([begin]))

    def adjoin(self, dout: Tensor, tensors: Mapping[str, Tensor | None], end: int) -> Tensor:
        given = {**tensors, **self.options}
        op = getattr(torch.ops.packc, f"{self.name}_adjoint")
        return op(dout, *(given[name] for name in self.summary.adjoint_takes), torch.tensor([end]))

    def of_tokens(self, tensors: Mapping[str, Tensor | None], begin: int, end: int) -> dict[str, Tensor | None]:
        def part(name: str, x: Tensor | None) -> Tensor | None:
            return x[:, begin:end] if name in self.mixer.per_token and x is not None else x

        return {name: part(name, x) for name, x in tensors.items()}


def in_dtype(tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.to(dtype) for name, x in tensors.items()}


def poison(tensors: Mapping[str, Tensor | None], begin: int, end: int, names: tuple[str, ...]) -> dict[str, Any]:
    """NaN in some tokens."""
    poisoned = {name: None if x is None else x.clone() for name, x in tensors.items()}
    for name in names:
        if (x := poisoned[name]) is not None:
            x[:, begin:end] = torch.nan
    return poisoned


def agree_with_fp64(recurrence: Recurrence, tensors: Mapping[str, Tensor | None], place: int) -> None:
    """Summary and adjoint of tensors as they are, with NaN in the tokens outside of each segment."""
    like, per_token = tensors[recurrence.mixer.like], recurrence.mixer.per_token
    assert like is not None
    wide, dout = in_dtype(tensors, torch.float64), torch.randn_like(like)
    transition, state = recurrence.summarize(poison(tensors, 0, place, per_token), place)
    expected, expected_state = recurrence.summarize(wide, place)
    assert_equal(state, expected_state.float(), 1e-5)
    behind = poison({**tensors, "dout": dout}, place, like.shape[1], (*per_token, "dout"))
    expected_dstate = recurrence.adjoin(dout.double(), wide, place)
    assert_equal(recurrence.adjoin(behind["dout"], behind, place), expected_dstate.float(), 1e-5)
    # A matrix that takes almost all away is the small difference of large ones: small beside what enters.
    least = min(1, expected.abs().max().item()) if recurrence.summary.transition == "H K K" else 1
    assert_equal(transition, expected.float(), 1e-5 / least)


def assert_equal(result: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    assert relative_error(result, expected) <= tolerance


# ---- what there is ---------------------------------------------------------------------------------------------------


def _attention(decay: str) -> Callable[[int], dict[str, Tensor | None]]:
    def make(L: int) -> dict[str, Tensor | None]:
        tensors = MIXERS["linear_attention"].make(1, L)
        if decay == "head":
            tensors["g"] = torch.tensor([-0.01, -0.3]).expand(1, L, 2)
        return tensors if decay != "none" else {**tensors, "g": None}

    return make


def _ssd(L: int) -> dict[str, Tensor | None]:
    tensors = MIXERS["ssd"].make(1, L)
    tensors["dt"] = F.softplus(tensors["dt"] + tensors.pop("dt_bias"))
    return tensors


def _selective_scan(L: int) -> dict[str, Tensor | None]:
    return {**MIXERS["selective_scan"].make(1, L)}


def _plain_selective_scan(L: int) -> dict[str, Tensor | None]:
    """Of groups, and of more channels and states than fill whole vectors."""
    D, N, G = 10, 5, 2
    return {
        "u": torch.randn(1, L, D),
        "delta": torch.rand(1, L, D),
        "A": -torch.rand(D, N),
        **{name: torch.randn(1, L, G, N) for name in ("B", "C")},
        **dict.fromkeys(("D", "z", "delta_bias")),
    }


def _of(name: str) -> Callable[[int], dict[str, Tensor | None]]:
    return lambda L: {**MIXERS[name].make(1, L)}


RECURRENCES = {
    "linear_attention": Recurrence("linear_attention", _attention("token"), {"scale": 0.4}),
    "linear_attention, a decay per head": Recurrence("linear_attention", _attention("head"), {"scale": 0.4}, True),
    "linear_attention without decay": Recurrence("linear_attention", _attention("none"), {"scale": 0.4}, True),
    "ssd": Recurrence("ssd", _ssd),
    "ssd without gate": Recurrence("ssd", lambda L: {**_ssd(L), "z": None}, variant=True),
    "selective_scan": Recurrence("selective_scan", _selective_scan, {"delta_softplus": True}),
    "selective_scan as it comes": Recurrence("selective_scan", _plain_selective_scan, {"delta_softplus": False}, True),
    "linear_scan": Recurrence("linear_scan", _of("linear_scan")),
    "gated_delta_rule": Recurrence("gated_delta_rule", _of("gated_delta_rule"), {"scale": 0.4}),
    "gated_delta_rule per channel": Recurrence(
        "gated_delta_rule", _of("gated_delta_rule_per_channel"), {"scale": 0.4}, True
    ),
}
