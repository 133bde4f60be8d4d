"""The mixers that share a contract, each with inputs for its tests; and a call together with all its gradients."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from selective_scan_data import offsets, relative_error, reproducible_like
from torch import Tensor

from packc import ops
from packc.ops import testing
from packc.ops.mixer import MIXERS as DECLARED
from packc.ops.mixer import Mixer as Declaration


class Mixer(NamedTuple):
    function: Callable
    make: Callable[..., dict[str, Tensor]]  # of B and L, and sizes: fp32, every argument that has a gradient but states
    state: tuple[int, ...]  # of a document
    declaration: Declaration
    options: Mapping = MappingProxyType({})

    def per_token(self) -> tuple[str, ...]:
        return tuple(name for name, x in self.make(1, 1).items() if x.ndim > 2)


def mixer(
    name: str,
    forms: Mapping[str, str] | None = None,
    lay: Mapping[str, Callable] | None = None,
    without: Sequence[str] = (),
    **sizes: Any,
) -> Mixer:
    """As declared; with arguments of other shapes, or that lie otherwise in memory, or without some, by name."""
    declaration = DECLARED[name]

    def make(B: int, L: int, **others: Any) -> dict[str, Tensor]:
        tensors = testing.inputs(declaration, B, L, forms, **{**sizes, **others})
        tensors |= {name: how(tensors[name]) for name, how in (lay or {}).items()}
        return {name: x for name, x in tensors.items() if name not in without}

    state = testing.state_shape(declaration, **sizes)
    return Mixer(getattr(ops, name), make, state, declaration, declaration.example.options)


MIXERS = {name: mixer(name) for name, declared in sorted(DECLARED.items()) if declared.state is not None}
MIXERS["gated_delta_rule_per_channel"] = mixer("gated_delta_rule", {"g": "B L H K"})

# Inputs for which other kernels run.
OTHERS = {
    "causal_conv1d of channel-first inputs": mixer("causal_conv1d", lay={"x": lambda x: x.mT.contiguous().mT}),
    "causal_conv1d of halves": mixer("causal_conv1d", lay=dict.fromkeys(("x", "weight", "bias"), Tensor.half)),
}


def positions(lengths: list[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(offsets(lengths).tolist())]


def only(mixer: Mixer, inputs: dict[str, Tensor], part: slice | Tensor) -> dict[str, Tensor]:
    """The inputs of some tokens."""
    return {name: x[:, part] if name in mixer.per_token() else x for name, x in inputs.items()}


def in_dtype(mixer: Mixer, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return testing.in_dtype(mixer.declaration, inputs, dtype)


def run(
    mixer: Mixer,
    inputs: dict[str, Tensor],
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    dout: Tensor | None = None,
    dfinal: Tensor | None = None,
    output_final_state: bool = True,
) -> dict[str, Tensor]:
    """``out``, ``final_state`` and ``d<name>`` of every input, for the given (or reproducible) output gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    if state is not None:
        leaves["initial_state"] = state.detach().requires_grad_()
    call = mixer.function(**leaves, **mixer.options, cu_seqlens=cu_seqlens, output_final_state=output_final_state)
    results = dict(zip(("out", "final_state"), call if output_final_state else (call,), strict=False))
    douts = [
        reproducible_like(x) if grad is None else grad.to(x.dtype)
        for x, grad in zip(results.values(), (dout, dfinal), strict=False)
    ]
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), douts)
    return {name: x.detach() for name, x in results.items()} | {
        f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def exactly(mixer: Mixer, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """In fp64, which the reference computes."""
    more = {name: _wide(x) for name, x in kwargs.items()}
    return run(mixer, in_dtype(mixer, inputs, torch.float64), *map(_wide, args), **more)


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def assert_close(results: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    errors = {name: relative_error(x, exact[name]) for name, x in results.items()}
    assert all(error <= tolerance for error in errors.values()), errors
