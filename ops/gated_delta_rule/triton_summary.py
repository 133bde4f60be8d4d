"""The gated delta rule's summary and adjoint on Triton: of the two documents into which a place cuts the row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from packc.ops import documents
from packc.ops.common.chunks import chunk_states_shape
from packc.ops.common.triton_chunks import chunks_of, countable, shared_arguments
from packc.ops.gated_delta_rule.triton_errors import recompute_errors
from packc.ops.gated_delta_rule.triton_gates import gate_of
from packc.ops.gated_delta_rule.triton_pairs import pairs_of
from packc.ops.gated_delta_rule.triton_resolvents import resolve
from packc.ops.gated_delta_rule.triton_solutions import solve
from packc.ops.gated_delta_rule.triton_state_gradients import correct_gradients
from packc.ops.gated_delta_rule.triton_states import correct_states


def summary(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix is what becomes of the unit matrix, whose columns stand beside the state's, with values of zero."""
    K, V = k.shape[3], v.shape[3]
    k, v, g, beta = countable(k, F.pad(v, (0, K)), g, beta)
    chunks = chunks_of(documents.cut(begin, v), v)
    states = v.new_zeros((2, v.shape[2], K, V + K), dtype=torch.float32)
    states[1, :, :, V:].diagonal(dim1=-2, dim2=-1).fill_(1)
    kept = v.new_empty(chunk_states_shape(k, v), dtype=torch.float32)
    gate, shared = gate_of(g, chunks), shared_arguments(k, v, chunks)
    resolvents = resolve(pairs_of(k, k, gate, shared, with_itself=False), beta, shared)
    readers, u = solve(k, gate, beta, resolvents, shared), solve(v, None, beta, resolvents, shared)
    correct_states(k, gate, beta, readers, u, chunks, states, kept, shared)
    return states[1:, ..., V:].contiguous(), states[1:, ..., :V].contiguous()


def adjoint(dout: Tensor, q: Tensor, k: Tensor, g: Tensor, beta: Tensor, scale: float, end: Tensor) -> Tensor:
    dout, q, k, g, beta = countable(dout, q, k, g, beta)
    chunks = chunks_of(documents.cut(end, dout), dout)
    dstates = dout.new_zeros((2, dout.shape[2], k.shape[3], dout.shape[3]), dtype=torch.float32)
    dkept = dout.new_empty(chunk_states_shape(k, dout), dtype=torch.float32)
    gate, shared = gate_of(g, chunks), shared_arguments(k, dout, chunks)
    resolvents = resolve(pairs_of(k, k, gate, shared, with_itself=False), beta, shared)
    readers, pairs = solve(k, gate, beta, resolvents, shared), pairs_of(q, k, gate, shared, with_itself=True)
    du = recompute_errors(dout, None, None, pairs, None, None, scale, shared)
    correct_gradients(q, k, gate, beta, dout, readers, chunks, dstates, du, dkept, scale, shared)
    return dstates[:1].clone()
