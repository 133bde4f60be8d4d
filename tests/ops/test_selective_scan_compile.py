"""The op under the compiler: fakes tell the truth, strides included, and one compilation serves every length."""

import pytest
import torch
from selective_scan_data import assert_all_close, make_inputs, offsets, scan_and_grads
from torch.utils.flop_counter import FlopCounterMode

from packc.ops import selective_scan


def op_arguments(inputs, cu_seqlens=None, initial_state=None, output_final_state=False):
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    return (*(inputs.get(name) for name in names), True, cu_seqlens, initial_state, output_final_state)


@pytest.mark.parametrize("first", [True, False])
def test_opcheck_of_the_backward(first):
    inputs = make_inputs(L=70)
    arguments = op_arguments(inputs, offsets([0, 30, 40]), torch.randn(3, 12, 5), True)
    out, final, chunks = torch.ops.packc.selective_scan.default(*arguments)
    grads = (torch.randn_like(out), torch.randn_like(final), chunks, *arguments[:-1], first)
    torch.library.opcheck(torch.ops.packc.selective_scan_bwd.default, grads)
    ddelta = torch.ops.packc.selective_scan_bwd.default(*grads)[1]
    assert ddelta.stride() == ((840, 1, 70) if first else (840, 12, 1))


def test_gradient_of_delta_lies_in_memory_as_delta_does():
    inputs = make_inputs(L=70)
    assert scan_and_grads(inputs)["ddelta"].is_contiguous()
    inputs["delta"] = inputs["delta"].mT.contiguous().mT
    assert scan_and_grads(inputs)["ddelta"].stride() == (840, 1, 70)


def test_one_compilation_serves_every_length_and_number_of_documents():
    def loss(inputs, cu_seqlens, state):
        out, final = selective_scan(
            **inputs, delta_softplus=True, cu_seqlens=cu_seqlens, initial_state=state, output_final_state=True
        )
        return out.square().sum() + final.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for step, lengths in enumerate([[30, 40], [100, 0, 65], [3, 4, 5, 6]]):
        inputs = {name: x.requires_grad_() for name, x in make_inputs(L=sum(lengths)).items()}
        state = torch.randn(len(lengths), 12, 5, requires_grad=True)
        leaves = [*inputs.values(), state]
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            results = torch.autograd.grad(compiled(inputs, offsets(lengths), state), leaves)
        expected = torch.autograd.grad(loss(inputs, offsets(lengths), state), leaves)
        assert_all_close(dict(enumerate(results)), dict(enumerate(expected)))


@pytest.mark.parametrize("train", [False, True])
def test_an_unbacked_length_compiles(train):
    """Every length, also one, out of one compilation that was told nothing of it."""

    def scan(u, delta, A, B, C, cu_seqlens):
        return selective_scan(u, delta, A, B, C, delta_softplus=True, cu_seqlens=cu_seqlens)

    compiled = torch.compile(scan, fullgraph=True)
    for step, L in enumerate([50, 1, 130]):
        inputs = make_inputs(L=L)
        values = [inputs[name].requires_grad_(train) for name in ("u", "delta", "A", "B", "C")]
        for x in values:
            if x.ndim == 3:
                torch._dynamo.decorators.mark_unbacked(x, 1)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            out = compiled(*values, offsets([L]))
        expected = scan(*values, offsets([L]))
        torch.testing.assert_close(out, expected)
        if train:
            dout = torch.randn_like(out)
            results = torch.autograd.grad(out, values, dout)
            torch.testing.assert_close(results, torch.autograd.grad(expected, values, dout))


def test_lengths_that_a_trace_cannot_compare_are_checked_by_the_kernel():
    inputs = make_inputs(L=20)
    inputs["delta"] = inputs["delta"][:, :19]
    with pytest.raises(ValueError, match="delta must have shape"):
        torch.ops.packc.selective_scan.default(*op_arguments(inputs))


def test_flops_count_every_state_of_every_token():
    inputs = {name: x.requires_grad_() for name, x in make_inputs(B=2, L=10, D=3, N=4).items()}
    with FlopCounterMode(display=False) as counter:
        selective_scan(**inputs).sum().backward()
    assert counter.get_total_flops() == (7 + 21) * 2 * 10 * 3 * 4
