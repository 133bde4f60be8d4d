"""What a convolution's window holds, as the summary of a segment: inputs that it shifts in, and out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packc.ops import causal_conv1d
from packc.ops.causal_conv1d.op import MIXER


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(0, 6), width=st.integers(1, 5), data=st.data())
def test_through_a_segment_a_window_becomes_the_final_state(tokens, width, data):
    begin = data.draw(st.integers(0, tokens))
    x, weight = torch.randn(1, tokens, 3, dtype=torch.float64), torch.randn(3, width, dtype=torch.float64)
    window = torch.randn(1, 3, width - 1, dtype=torch.float64)
    _, want = causal_conv1d(x[:, begin:], weight, initial_state=window, output_final_state=True)
    summary = MIXER.summary
    transition, state = torch.ops.packc.causal_conv1d_summary.default(x, weight, torch.tensor([begin]))
    assert torch.equal(summary.through(transition, window, {}) + state, want)
    # Twice is through both, and the transpose is one.
    twice = summary.through(transition, summary.through(transition, window, {}), {})
    assert torch.equal(summary.through(summary.compose(transition, transition), window, {}), twice)
    other = torch.randn_like(window)
    there, back = summary.through(transition, window, {}), summary.through_adjoint(transition, other, {})
    torch.testing.assert_close((there * other).sum(), (window * back).sum())


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("on_host", [True, False])
def test_a_window_and_its_gradient_are_of_the_segment_alone(monkeypatch, on_host, tokens, activation):
    monkeypatch.setattr("packc.ops.summary.on_host", lambda _: on_host)
    x, dout = torch.randn(2, 1, 6, 3, dtype=torch.float64)
    weight, window = torch.randn(3, 4, dtype=torch.float64), torch.randn(1, 3, 3, dtype=torch.float64)
    window.requires_grad_()
    segment, begin = x[:, :tokens], torch.tensor([6 - tokens])
    _, want = causal_conv1d(x[:, 6 - tokens :], weight, initial_state=torch.zeros(1, 3, 3), output_final_state=True)
    transition, state = torch.ops.packc.causal_conv1d_summary.default(x, weight, begin)
    assert torch.equal(state, want)
    assert transition.tolist() == [min(tokens, 3)]
    out = causal_conv1d(segment, weight, activation=activation, initial_state=window)
    (dwindow,) = torch.autograd.grad(out, window, dout[:, :tokens])
    adjoint = torch.ops.packc.causal_conv1d_adjoint.default
    got = adjoint(dout, x, weight, None, activation, window.detach(), torch.tensor([tokens]))
    torch.testing.assert_close(got, dwindow)


@pytest.mark.parametrize("begin", [0, 3, 5])
def test_opcheck(begin):
    arguments = torch.randn(1, 5, 3), torch.randn(3, 4), torch.tensor([begin])
    torch.library.opcheck(torch.ops.packc.causal_conv1d_summary.default, arguments)
