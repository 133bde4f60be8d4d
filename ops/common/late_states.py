"""Linear attention and SSD with states that come late: what they add to results and gradients of before.

A state ``S`` that enters a segment adds to the output of its token t::

    decay[t] scale S^T q[t]                  decay[t] = exp(g[0] + ... + g[t])

and to the state behind it ``decay[t] S``. A gradient ``dS`` of the state that leaves adds, with the decay of all that
lies behind, ``rest[t] = exp(g[t+1] + ... + g[T-1])``, and the state ``before`` the segment::

    dk[t]    += rest[t] step[t] dS v[t]
    dv[t]    += rest[t] step[t] dS^T k[t]
    dstep[t] += rest[t] k[t]^T dS v[t]
    dg[t]    += decay[T-1] <dS, before> + sum_{s < t} rest[s] step[s] k[s]^T dS v[s]

Logarithms are summed from the end that counts, so that no two large ones are subtracted. States are ``(1, H, K, V)``
here, keys and queries those of groups of heads. Where places are on the host, no other token is looked at; elsewhere
all are, and count as zeros. ``csrc/linear_attention_late.cpp`` does the same in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from packc.ops import summary
from packc.ops.common.chunks import CHUNK, chunk_states_shape

BLOCK = 8 * CHUNK
"""Tokens at a time, so that what is made on the way stays in a cache."""


class Made(NamedTuple):
    """By an op to which no state came."""

    out: Tensor
    final_state: Tensor
    """``(documents, H, K, V)``; of no document unless it was asked for."""
    chunk_states: Tensor


def enter(
    kernels: Any,
    made: Made,
    entering: Tensor,
    q: Tensor,
    g: Tensor | None,
    scale: float,
    z: Tensor | None,
    end: Tensor,
    document: Tensor,
) -> None:
    """``g (1, L, H)``; SiLU of ``z (1, L, H, V)`` is a factor of the output."""
    if summary.on_host(end) and hasattr(kernels, "enter"):
        kernels.enter(made.out, made.final_state, made.chunk_states, entering, q, g, scale, z, end, document)
        return
    state, V = entering[0].contiguous(), entering.shape[3]
    last = int(end) if summary.on_host(end) else None
    chunk_states = made.chunk_states.view(chunk_states_shape(q, made.out))[0, ..., :V]
    before = state.new_zeros(state.shape[0])
    for part in _blocks(0, q.shape[1] if last is None else last):
        inside = None if last is not None else torch.arange(part.start, part.stop, device=end.device) < end
        logs = before + _logs(g, part, state, inside).cumsum(0)
        before, decay = logs[-1], _exp(logs)
        if last is not None and not decay.any():
            return  # nothing of the state is left
        out, queries = made.out[0, part], _read(q, part, state, inside)
        if z is None:
            _add_products(out, queries, scale * decay, state)
        else:
            added = _products(queries, state) * (scale * decay)[..., None]
            out.addcmul_(added, F.silu(_read(z, part, state, inside)))
        # Of the chunks that begin in the document, behind a token of this block.
        begun = torch.arange(part.start, part.stop, device=end.device)[CHUNK - 1 :: CHUNK] + 1
        passing = torch.where((begun < end)[:, None], decay[CHUNK - 1 :: CHUNK], 0)
        kept = chunk_states[part.start // CHUNK :][: len(passing)]
        kept.addcmul_(passing[..., None, None], state)
        if made.final_state.shape[0]:
            tokens = torch.arange(part.start, part.stop, device=end.device)
            left = torch.where((tokens + 1 == end)[:, None], decay, 0).sum(0)
            ends = ((end > part.start) & (end <= part.stop)).view(1, 1, 1, 1)
            made.final_state.index_add_(0, document, torch.where(ends, left[:, None, None] * state, 0))


class Gradients(NamedTuple):
    k: Tensor
    v: Tensor
    g: Tensor | None
    step: Tensor | None


def leave(
    kernels: Any,
    grads: Gradients,
    leaving: Tensor,
    before: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    step: Tensor | None,
    begin: Tensor,
) -> None:
    """``g`` and ``step`` are ``(1, L, H)``."""
    on_host = summary.on_host(begin)
    if on_host and hasattr(kernels, "leave"):
        of_g, of_step = kernels.leave(grads.k, grads.v, leaving, before, k, v, g, step, begin)
        for grad, added in ((grads.g, of_g), (grads.step, of_step)):
            if grad is not None:
                grad[:, grad.shape[1] - added.shape[1] :] += added
        return
    dstate, L = leaving[0].contiguous(), v.shape[1]
    first = int(begin) if on_host else 0
    behind = dstate.new_zeros(dstate.shape[0])
    products = dstate.new_zeros(L - first, dstate.shape[0])
    for part in reversed([*_blocks(first, L)]):
        inside = None if on_host else torch.arange(part.start, part.stop, device=begin.device) >= begin
        summed = behind + _logs(g, part, dstate, inside).flip(0).cumsum(0).flip(0)
        rest = _exp(torch.cat([summed[1:], behind[None]]))
        behind = summed[0]
        if on_host and not rest.any():
            break  # nothing of the gradient comes as far
        keys, values = (_read(x, part, dstate, inside) for x in (k, v))
        steps = None if step is None else _read(step, part, dstate, inside)
        product = _add_gradients(grads.k[0, part], grads.v[0, part], keys, values, rest, steps, dstate)
        if steps is not None:
            if grads.step is not None:
                grads.step[0, part] += product
            product = steps * product
        products[part.start - first : part.stop - first] = product
    if grads.g is not None and first < L:
        passed = behind.exp() * (dstate * before[0]).sum((1, 2))
        added = passed + torch.cat([torch.zeros_like(products[:1]), products[:-1]]).cumsum(0)
        inside = torch.arange(first, L, device=begin.device) >= begin
        grads.g[0, first:] += torch.where(inside[:, None], added, 0)


def _blocks(first: int, last: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, last)) for start in range(first, last, BLOCK))


def _read(x: Tensor, part: slice, like: Tensor, inside: Tensor | None) -> Tensor:
    read = x[0, part].to(like.dtype)
    return read if inside is None else torch.where(inside.view(-1, *[1] * (read.ndim - 1)), read, 0)


def _logs(g: Tensor | None, part: slice, state: Tensor, inside: Tensor | None) -> Tensor:
    if g is None:
        return state.new_zeros(part.stop - part.start, state.shape[0])
    return _read(g, part, state, inside)


def _exp(logs: Tensor) -> Tensor:
    """Zero where it would be a subnormal number, with which processors take their time."""
    found = logs.exp()
    return torch.where(found < torch.finfo(found.dtype).tiny, 0, found)


def _add_products(to: Tensor, x: Tensor, factor: Tensor, state: Tensor) -> None:
    """Adds to ``to (L, H, V)`` the products of ``x (L, G, K)`` and the states, times ``factor (L, H)``."""
    if x.shape[1] == state.shape[0]:
        _add_matmul(to, x * factor[..., None], state)
    else:
        to.addcmul_(_products(x, state), factor[..., None])


def _add_matmul(to: Tensor, x: Tensor, states: Tensor) -> None:
    """Of each head, one after the other: what is read and written is where it is."""
    if to.dtype == states.dtype:
        to.transpose(0, 1).baddbmm_(x.transpose(0, 1), states)
    else:
        to += (x.transpose(0, 1) @ states).transpose(0, 1)


def _add_gradients(
    dk: Tensor, dv: Tensor, keys: Tensor, values: Tensor, rest: Tensor, steps: Tensor | None, dstate: Tensor
) -> Tensor:
    """``rest k^T dS v (L, H)``, once ``dk`` and ``dv`` have theirs."""
    factor = (rest if steps is None else steps * rest)[..., None]
    if keys.shape[1] == dstate.shape[0]:
        of_values = ((rest[..., None] * values).transpose(0, 1) @ dstate.mT).transpose(0, 1)
        _add_matmul(dv, factor * keys, dstate)
        dk += of_values if steps is None else steps[..., None] * of_values
        return (of_values * keys).sum(-1)
    of_keys = _products(keys, dstate)
    dv.addcmul_(of_keys, factor)
    dk += _sums(factor * values, dstate, keys.shape[1])
    return rest * (of_keys * values).sum(-1)


def _products(x: Tensor, state: Tensor) -> Tensor:
    """``x (L, G, K)`` times the states ``(H, K, V)`` of their heads: ``(L, H, V)``."""
    grouped = state.unflatten(0, (x.shape[1], -1))
    return torch.einsum("l g k, g r k v -> l g r v", x, grouped).flatten(1, 2)


def _sums(x: Tensor, state: Tensor, groups: int) -> Tensor:
    """``x (L, H, V)`` times the transposed states, summed over each group's heads: ``(L, G, K)``."""
    grouped = state.unflatten(0, (groups, -1))
    return torch.einsum("l g r v, g r k v -> l g k", x.unflatten(1, (groups, -1)), grouped)
