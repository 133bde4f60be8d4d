"""Inputs for the selective scan's tests, and a scan together with all its gradients."""

import torch
from torch import Tensor

from packc.ops import selective_scan

OPTIONAL = ("D", "z", "delta_bias")


def make_inputs(
    B: int = 1, L: int = 20, D: int = 12, N: int = 5, G: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Every tensor argument but the states, drawn as Mamba's magnitudes are."""
    groups = () if G is None else (G,)
    values = {
        "u": torch.randn(B, L, D),
        "delta": torch.randn(B, L, D),
        "A": -torch.exp(torch.randn(D, N) / 2),
        "B": torch.randn(B, L, *groups, N),
        "C": torch.randn(B, L, *groups, N),
        "D": torch.randn(D),
        "z": torch.randn(B, L, D),
        "delta_bias": torch.randn(D) - 1,
    }
    return {name: x.to(dtype) for name, x in values.items()}


def offsets(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def tokens(inputs: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """The inputs of some tokens."""
    return {name: x[:, part] if x.ndim >= 3 else x for name, x in inputs.items()}


def scan_and_grads(
    inputs: dict[str, Tensor],
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    delta_softplus: bool = True,
    dout: Tensor | None = None,
    dfinal: Tensor | None = None,
) -> dict[str, Tensor]:
    """``out``, ``final_state`` and ``d<name>`` of every input, for the given (or reproducible) output gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    state = None if initial_state is None else initial_state.detach().requires_grad_()
    out, final = selective_scan(
        **leaves,
        delta_softplus=delta_softplus,
        cu_seqlens=cu_seqlens,
        initial_state=state,
        output_final_state=True,
    )
    dout = reproducible_like(out) if dout is None else dout
    dfinal = reproducible_like(final) if dfinal is None else dfinal
    if state is not None:
        leaves["initial_state"] = state
    grads = torch.autograd.grad([out, final], list(leaves.values()), [dout, dfinal])
    return {"out": out, "final_state": final} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def reproducible_like(x: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(x.numel())
    return torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)


def relative_error(x: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    assert x.shape == exact.shape
    if x.numel() == 0:
        return 0.0
    return ((x.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1e-30)).item()


def assert_all_close(results: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    errors = {name: relative_error(x, exact[name]) for name, x in results.items()}
    assert all(error <= tolerance for error in errors.values()), errors


def as_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in inputs.items()}
