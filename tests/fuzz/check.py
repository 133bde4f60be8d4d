"""One program, packed and eager, on batches of every kind."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fuzz.batches import KINDS, make_inputs
from fuzz.front import serves, traced
from fuzz.program import Program, Value, are_tokens, axis_mask
from packc.compiler import pack_graph
from packc.packed_call import PackedCall
from packc.passes import NoMask, NotPackable

BATCHES = 4
TOLERANCE = 1e-7
"""In fp64, of the largest entry."""


class Wrong(Exception):
    """packc's answer is not eager's, or there is none; the message says where."""


@dataclass
class Outcome:
    kind: str
    """``packed``, ``unpacked``, or why the program says nothing: ``untraceable``, ``no derivative``."""
    reason: str = ""
    batches: int = 0
    with_padding_left_out: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    """Ops that are computed packed."""
    refusals: Counter[str] = field(default_factory=Counter)


def check(program: Program, *, batches: int = BATCHES) -> Outcome:
    """
    Raises:
        Wrong: packed is not eager.
    """
    gm, fakes, shape_env = traced(program)
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):  # quicker: nothing comes twice
            packed = pack_graph(gm, fakes)
    except (NoMask, NotPackable) as reason:
        return Outcome("unpacked", str(reason))
    except Exception as error:
        if not _can_be_traced(program):
            return Outcome("untraceable", repr(error)[:100])
        raise Wrong(f"a pass failed: {error!r}") from error
    outcome = Outcome("packed")
    outcome.rules.update(str(node.target) for node in packed.forms.packed if node in packed.tokens.readings)
    outcome.refusals.update(str(node.target) for node in packed.tokens.refusals)
    padded = packed.with_padding and (packed.with_padding.gm, packed.with_padding.streams)
    call = PackedCall(packed.gm, packed.gm, packed.streams, strict=False, with_padding=padded)
    for sizes, kind, seed in _batches(program, batches):
        inputs = make_inputs(program.inputs, sizes, kind, seed)
        if not serves(shape_env, fakes, list(inputs.values())):
            continue
        if compare(program, call, inputs, f"B, L = {sizes}, padding {kind!r}, seed {seed}"):
            outcome.batches += 1
            outcome.with_padding_left_out += any(last.tokens < last.padded_tokens for last in call.last)
    return outcome


def _batches(program: Program, count: int) -> Any:
    draw = random.Random(f"batches {program.seed}")
    for number in range(count):
        sizes = tuple(
            draw.randint(2, 7) if name in program.symbolic and number else size
            for name, size in zip("BL", program.sizes, strict=True)
        )
        yield sizes, draw.choice(KINDS), draw.randrange(2**31)


def compare(program: Program, call: Any, inputs: dict[str, Tensor], where: str) -> bool:
    """False if eager itself gives nothing to compare with."""
    try:
        eager = _outputs(program.function(), inputs, program)
        expected = _results(program, eager, inputs, eager)
    except (RuntimeError, IndexError, ValueError):
        return False  # sizes for which the program is none, or no derivative
    if not all(bool(value.isfinite().all()) for value in expected.values() if value.is_floating_point()):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed = _outputs(call, inputs, program)
        _same_strides(program, packed.values, eager.values, inputs)
        actual = _results(program, packed, inputs, packed)
        if any(value.cut == "?" for value in program.outputs):
            expected = _results(program, eager, inputs, packed)
    except Exception as error:
        raise Wrong(f"{where}: {error!r}") from error
    for name, value in expected.items():
        message = _difference(actual[name], value)
        if message is not None:
            raise Wrong(f"{where}: {name}: {message}")
    return True


def _same_strides(
    program: Program, packed: tuple[Tensor, ...], eager: tuple[Tensor, ...], inputs: dict[str, Tensor]
) -> None:
    """Where eager's values lie end to end, in an order that no axis of size one leaves open; or as torch says that they
    do, of fakes (of ``2 ** x`` it is mistaken)."""
    for n, (value, got, want) in enumerate(zip(program.outputs, packed, eager, strict=True)):
        order = sorted(range(want.ndim), key=lambda axis: -want.stride(axis))
        if want.permute(order).is_contiguous() and 1 not in want.shape and got.stride() != want.stride():
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                said = program.function()(*map(mode.from_tensor, inputs.values()))[n]
            if got.stride() != said.stride():
                raise ValueError(f"{value.name}: strides {got.stride()} are not {want.stride()}")


class _Outputs(NamedTuple):
    values: tuple[Tensor, ...]
    leaves: dict[str, Tensor]


def _outputs(model: Any, inputs: dict[str, Tensor], program: Program) -> _Outputs:
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if value.is_floating_point() and name not in {each.name for each in program.inputs if each.kind == "mask"}
    }
    return _Outputs(model(*(leaves.get(name, value) for name, value in inputs.items())), leaves)


def _results(program: Program, made: _Outputs, inputs: dict[str, Tensor], packed: _Outputs) -> dict[str, Tensor]:
    """Outputs where they count, and gradients of all inputs with respect to those."""
    results, total = dict[str, Tensor](), torch.zeros((), dtype=torch.float64)
    for value, out, of_packed in zip(program.outputs, made.values, packed.values, strict=True):
        for shown in _shown(program, value, inputs, of_packed):
            out = torch.where(shown, out, torch.zeros_like(out))
        results[value.name] = out.detach()
        if out.requires_grad:
            generator = torch.Generator().manual_seed(len(results))
            total = total + (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
    if total.requires_grad:
        leaves = list(made.leaves.values())
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
        for (name, leaf), gradient in zip(made.leaves.items(), gradients, strict=True):
            results[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def _shown(program: Program, value: Value, inputs: dict[str, Tensor], packed: Tensor) -> Iterator[Tensor]:
    """Where an output counts: at tokens, if it is of tokens."""
    for mask in program.masks_of(value):
        real = inputs[mask] != 0
        if are_tokens(value.axes):
            yield axis_mask(value, packed.shape, real)
        elif value.cut not in ("", "?"):
            cut = eval(value.cut.format("real"), {"real": real[..., None], "L": real.shape[1]})
            yield cut.reshape(*cut.shape[:2], *[1] * (packed.ndim - 2))
    if value.cut == "?":
        yield packed.detach() != 0  # zero where it comes from padding


def _difference(actual: Tensor, expected: Tensor) -> str | None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{tuple(actual.shape)} {actual.dtype} is not {tuple(expected.shape)} {expected.dtype}"
    if expected.numel() == 0:
        return None
    error = (actual.double() - expected.double()).abs().max().item()
    scale = max(1.0, expected.double().abs().max().item())
    return None if error <= TOLERANCE * scale else f"off by {error:.2g} where the largest is {scale:.2g}"


def _can_be_traced(program: Program) -> bool:
    """Whether torch itself follows the program: Dynamo would have broken the graph otherwise."""
    gm, fakes, _ = traced(program)
    try:
        make_fx(gm, pre_dispatch=True)(*fakes)
    except Exception:
        return False
    return True
