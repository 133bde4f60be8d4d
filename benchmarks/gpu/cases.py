"""The ops at the sizes of models, as the steps call them: what ``prebuild.py`` compiles is what they launch.

Widths are those of the kernels, which are compiled for them; tokens are few where results are compared with fp64.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from step import HERE
from telling import device
from torch import Tensor

ROOT = HERE.parents[1]
sys.path += [str(ROOT / "tests" / "ops"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from mixers import MIXERS, OTHERS, Mixer, in_dtype, run  # noqa: E402
from selective_scan_data import offsets  # noqa: E402

from packc.ops import testing  # noqa: E402

TOKENS = 32768  # of what is timed
SHORT = [3, 0, 130, 1, 64, 250]  # documents compared with fp64: empty, of one token, of a chunk, of several
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def channel_first(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def half(x: Tensor) -> Tensor:
    """As a slice of a projection lies in memory."""
    return torch.cat([x, x], -1)[..., x.shape[-1] :]


class Sized(NamedTuple):
    sizes: dict[str, Any]
    tiny: dict[str, Any]  # for a dry run
    layout: dict[str, Callable[[Tensor], Tensor]] = {}  # noqa: RUF012


HEADS, TINY = {"H": 32, "G": 32, "K": 128, "V": 128}, {"H": 2, "G": 2, "K": 8, "V": 8}
OPS = {
    "causal_conv1d": Sized({"D": 4096}, {"D": 8}, {"x": half}),
    "selective_scan": Sized(
        {"D": 4096, "N": 16},
        {"D": 8, "N": 4},
        {"delta": channel_first, "z": half, "B": half, "C": half},
    ),
    "linear_scan": Sized({"D": (4096,)}, {"D": (8,)}),
    "linear_attention": Sized(HEADS, TINY),
    "ssd": Sized({"H": 64, "G": 1, "P": 64, "N": 128}, {"H": 2, "P": 8, "N": 8}),
    "gated_delta_rule": Sized(HEADS, TINY),
    "gated_delta_rule_per_channel": Sized(HEADS, TINY),
}


class Case(NamedTuple):
    op: str
    dtype: str
    form: str  # "packed", "rows", or "packed, states": with a state in and out

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype} {self.form}"


# Three kinds of kernels an op: what is timed, packed and dense, and fp32 with all that is optional.
CASES = [Case(op, *kind) for kind in (("bf16", "packed"), ("bf16", "rows"), ("fp32", "packed, states")) for op in OPS]


class Inputs(NamedTuple):
    mixer: Mixer
    tensors: dict[str, Tensor]
    lengths: list[int]
    cu_seqlens: Tensor | None
    state: Tensor | None
    dout: Tensor
    dfinal: Tensor | None

    def arguments(self) -> tuple[Tensor | None, ...]:
        """``run``'s, and ``exactly``'s, behind the tensors."""
        return self.cu_seqlens, self.state, self.dout, self.dfinal

    def results(self) -> dict[str, Tensor]:
        return run(self.mixer, self.tensors, *self.arguments(), output_final_state=self.state is not None)


def make(case: Case, lengths: list[int], dry: bool, on: torch.device | None = None) -> Inputs:
    """Random ones, on the steps' device or another; without documents a row for each of the equal lengths."""
    with on or device(dry):
        return _make(case, lengths, dry)


def _make(case: Case, lengths: list[int], dry: bool) -> Inputs:
    sized = OPS[case.op]
    mixer = (MIXERS | OTHERS)[case.op]
    sizes = sized.tiny if dry else sized.sizes
    mixer = mixer._replace(
        make=functools.partial(mixer.make, **sizes), state=testing.state_shape(mixer.declaration, **sizes)
    )
    packed, stateful = case.form.startswith("packed"), case.form.endswith("states")
    rows, tokens = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    tensors = in_dtype(mixer, mixer.make(rows, tokens), DTYPES[case.dtype])
    tensors |= {name: lay(tensors[name]) for name, lay in sized.layout.items()}
    like = tensors[mixer.declaration.like]
    states = (len(lengths), *mixer.state)
    return Inputs(
        mixer,
        tensors,
        lengths,
        offsets(lengths) if packed else None,
        torch.randn(states) if stateful else None,
        torch.randn(like.shape, dtype=like.dtype),
        torch.randn(states) if stateful else None,
    )


def compared_lengths(case: Case) -> list[int]:
    return SHORT if case.form.startswith("packed") else [200, 200]


MIDDLE, LAST = 150, 200  # tokens: fp64 has time for no more


def long_pack(tokens: int) -> tuple[list[int], int]:
    """Lengths that fill ``tokens``, as PackMamba draws them but for two, which are short; and which of them is the
    first of these. The other is the last."""
    half = tokens // 2
    before, after = documents(half - MIDDLE), documents(tokens - half - LAST)
    return [*before, MIDDLE, *after, LAST], len(before)


def documents(tokens: int) -> list[int]:
    """Lengths as PackMamba draws them, log-normal, that fill ``tokens``."""
    from op_contenders import LONGEST, MEAN_LENGTH, SHORTEST, Problem

    problem = Problem(tokens, 1, torch.float32, torch.device("cpu"))
    with torch.device("cpu"):
        return problem.documents(min(SHORTEST, tokens), LONGEST, MEAN_LENGTH).diff().tolist()
