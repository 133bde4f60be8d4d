"""Logits that are computed when they are first read, forward and backward.

Beside a loss, most callers read nothing; then a training step should not pay for ``(B, L, V)`` values and as many
gradients. What a compiled graph returns in their place are packed hidden states, and what is handed to the caller is a
:class:`LazyLogits`: a tensor to autograd and to everybody who asks for its size, dtype or device; whoever reads an
entry makes it compute them all, once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packc.fake_tensors import has_values
from packc.ops.untraced import untraced
from packc.passes import Autocast, Tail
from packc.private_torch import private_torch

with private_torch():
    from torch._C import _disabled_torch_function_impl
    from torch.utils._pytree import tree_map

aten = torch.ops.aten

_CHANGED = (
    "packc computes logits when they are first read, and the weights of the head changed after the forward pass: read"
    " logits before the optimizer's step (logits.detach().clone() keeps them), or set packc.lazy_logits to False"
)
_SAMPLES = 16
"""Along each axis of a weight."""


def with_lazy_logits(compiled: Callable[..., Any], tails: Sequence[Tail]) -> Callable[..., Any]:
    """``compiled``, with logits in the places where it returns hidden states."""
    if not tails:
        return compiled

    def call(*inputs: Any) -> Any:
        outputs = list(compiled(*inputs))
        for tail in tails:
            outputs[tail.output] = _logits(tail, outputs[tail.output], inputs)
        return tuple(outputs)

    return call


def _logits(tail: Tail, hidden: Tensor, inputs: Sequence[Any]) -> Tensor:
    weight, bias = inputs[tail.weight], None if tail.bias is None else inputs[tail.bias]
    shape = torch.Size((*tail.rows(hidden, inputs), weight.shape[0]))
    given = (hidden, None if tail.index is None else inputs[tail.index], weight, bias)
    plain = all(type(each) in (Tensor, torch.nn.Parameter) for each in given if each is not None)
    if not plain or not has_values(hidden):
        return tail.logits(shape, *given)
    return PackedLogits.apply(tail, shape, *given)


# ---- when they are computed ------------------------------------------------------------------------------------------


class Values:
    """The values of a tensor, made when they are first asked for."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._values: Tensor | None = None
        self._copies = weakref.WeakSet[Values]()

    def __call__(self) -> Tensor:
        if self._values is None:
            assert self._make is not None
            self._values = self._make()
            self._make = None
            for copy in self._copies:  # of what they are now: from here on somebody may write to them
                copy()
        return self._values

    def copy(self, dtype: torch.dtype) -> Values:
        copied = Values(lambda: self().to(dtype, copy=True))
        if self._values is None:
            self._copies.add(copied)
        else:
            copied()
        return copied


class LazyLogits(Tensor):
    """A tensor whose values are made when an op reads them. All that ops return is plain tensors."""

    values_of: Values

    __torch_function__ = _disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values_of: Values, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> LazyLogits:
        logits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        logits.values_of = values_of
        return logits

    @classmethod
    @untraced
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        x = args[0] if args else None
        if isinstance(x, LazyLogits):
            if op in (aten.detach.default, aten.alias.default):
                return LazyLogits(x.values_of, x.shape, x.dtype, x.device)
            if op is aten._to_copy.default and set(kwargs) == {"dtype"}:  # as for what runs under autocast
                dtype = kwargs["dtype"]
                return LazyLogits(x.values_of.copy(dtype), x.shape, dtype, x.device)
        read: dict[int, LazyLogits] = {}

        def values(x: Any) -> Any:
            if not isinstance(x, LazyLogits):
                return x
            found = x.values_of()
            read[id(found)] = x
            return found

        args, kwargs = tree_map(values, (args, kwargs or {}))
        # What was written to in place is returned as the tensor that it was.
        return tree_map(lambda result: read.get(id(result), result), op(*args, **kwargs))

    # torch.compile takes it apart into this, and puts it together again.
    @property
    def filled(self) -> Tensor:
        return self.values_of()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["filled"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, size: torch.Size, stride: Any) -> LazyLogits:
        filled = inner["filled"]
        return LazyLogits(Values(lambda: filled), size, filled.dtype, filled.device)

    def _stable_hash_for_caching(self) -> str:
        return "packc.LazyLogits"

    def __repr__(self, **how: Any) -> str:  # type: ignore[override]
        if type(self.filled) is not Tensor:  # in a trace, of which torch prints everything
            return f"LazyLogits({self.filled!r})"
        return super().__repr__(**how)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            return super().__deepcopy__(memo)  # which says why it cannot
        return memo.setdefault(id(self), self.clone())


class _Filled(torch.autograd.Function):
    """The same, as a plain tensor."""

    @staticmethod
    def forward(ctx: Any, logits: LazyLogits) -> Tensor:
        return aten.alias.default(logits.filled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _of_memory(name: str) -> Callable[..., Any]:
    """A method of a tensor that asks for its memory, and not by an op."""

    def method(self: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(_Filled.apply(self), name)(*args, **kwargs)

    method.__name__ = name
    return method


# Not its storage, which torch.compile asks for by itself.
for _name in ("numpy", "__array__", "tolist", "data_ptr", "__reduce_ex__", "__dlpack__", "share_memory_", "is_shared"):
    setattr(LazyLogits, _name, _of_memory(_name))


# ---- how they are computed -------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """A weight as it was in the forward pass.

    Whoever writes to ``x.data``, as some optimizers and FSDP do, leaves the version alone. So a few entries are kept.
    """

    tensor: Tensor
    version: int
    some: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Seen:
        x = x.detach()
        return cls(x, x._version, _some(x).clone())

    def is_as_it_was(self) -> bool:
        x = self.tensor
        if x._version != self.version or x.untyped_storage().nbytes() < x.numel() * x.element_size():
            return False
        return torch.allclose(_some(x), self.some, rtol=0, atol=0, equal_nan=True)


def _some(x: Tensor) -> Tensor:
    return x[tuple(slice(None, None, max(1, size // _SAMPLES)) for size in x.shape)]


def _in(autocast: Autocast) -> torch.autocast:
    return torch.autocast(*autocast, cache_enabled=False)


class PackedLogits(torch.autograd.Function):
    """Logits of packed hidden states, ``(B, L, V)`` or as they are, not computed yet."""

    @staticmethod
    def forward(
        ctx: Any,
        tail: Tail,
        shape: torch.Size,
        hidden: Tensor,
        index: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.tail, ctx.shape, ctx.autocast = tail, shape, tail.autocast or Autocast.around(hidden.device.type)
        ctx.save_for_backward(hidden, index, weight, bias)
        ctx.set_materialize_grads(False)
        states, head, autocast = hidden.detach(), [_Seen.of(x) for x in (weight, bias) if x is not None], ctx.autocast

        def make() -> Tensor:
            if not all(each.is_as_it_was() for each in head):
                raise RuntimeError(_CHANGED)
            with torch.no_grad(), _in(autocast):
                return tail.logits(shape, states, index, *(each.tensor for each in head))

        return LazyLogits(Values(make), shape, tail.dtype, hidden.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        again = torch.is_grad_enabled()  # whether what comes out is to be differentiated in turn
        wanted = [ctx.needs_input_grad[n] for n in (2, 3, 4, 5)]
        given = [
            x if x is None or again else x.detach().requires_grad_(is_wanted)
            for x, is_wanted in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        of = [x for x, is_wanted in zip(given, wanted, strict=True) if is_wanted]
        with torch.enable_grad(), _in(ctx.autocast):
            logits = ctx.tail.logits(ctx.shape, *given)
        found = iter(torch.autograd.grad(logits, of, grad, create_graph=again))
        return (None, None, *(next(found) if is_wanted else None for is_wanted in wanted))
