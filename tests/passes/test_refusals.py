"""What looks across tokens is not packed: it runs as it was, and the reason names the op."""

import pytest
import torch
from harness import RecordingBackend, masks
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn import functional as F

import packc

H = 4  # features, rows and positions
W = torch.randn(H, H, generator=torch.Generator().manual_seed(1))
TAPS = torch.randn(H, 2, generator=torch.Generator().manual_seed(2))

ACROSS_TOKENS = {
    "cumulative sum of positions": (lambda x, m: x.cumsum(1), "cumsum"),
    "softmax over positions": (lambda x, m: x.softmax(1), "softmax"),
    "maximum over positions": (lambda x, m: x.amax(1), "amax"),
    "reversal": (lambda x, m: x.flip(1), "flip"),
    "shift by slicing": (lambda x, m: x[:, 1:] - x[:, :-1], "slice"),
    "shift by padding": (lambda x, m: F.pad(x, (0, 0, 1, 0)), "pad"),
    "shift by rolling": (lambda x, m: x.roll(1, 1), "roll"),
    "mixing positions by a weight": (lambda x, m: W @ x, "matmul"),
    "mixing rows by a weight": (lambda x, m: torch.einsum("bld,bc->cld", x, W), "einsum"),
    "attention": (lambda x, m: (x @ x.transpose(1, 2)).softmax(-1) @ x, "matmul"),
    "sdpa": (lambda x, m: F.scaled_dot_product_attention(x, x, x, is_causal=True), "scaled_dot_product_attention"),
    "convolution": (lambda x, m: F.conv1d(x.transpose(1, 2), torch.stack([W, W], 2)), "conv1d"),
    "normalisation over positions": (lambda x, m: F.layer_norm(x, (H, H)), "layer_norm"),
    "batch norm": (lambda x, m: F.batch_norm(x.transpose(1, 2), None, None, training=True), "batch_norm"),
    "sum that counts padding": (lambda x, m: x.sum(), "sum"),
    "mean that counts padding": (lambda x, m: x.mean(), "mean"),
    "pooling that counts padding": (lambda x, m: x.mean(1), "mean"),
    "last positions": (lambda x, m: x[:, -2:].sum(1), "slice"),
    "features merged with positions": (lambda x, m: x.reshape(H, H * H), "reshape"),
    "rows split": (lambda x, m: x.view(2, 2, H, H).sum(0), "sum"),
    "joined along positions": (lambda x, m: torch.cat([x, x], 1), "cat"),
    "a position written": (lambda x, m: _write_a_position(x), "select_scatter"),
    "written in place through a reshape": (lambda x, m: _write_through_a_reshape(x), "copy_"),
    "scan by sums of logarithms": (lambda x, m: _scan_of_logarithms(x.sigmoid(), x), "cumsum"),
    "associative scan": (lambda x, m: _associative_scan(x.sigmoid(), x), "a tensor of numbers"),
    "gradient by torch.func": (lambda x, m: torch.func.grad(lambda y: y.cumsum(1).sum())(x), "a derivative"),
    "tangent by torch.func": (lambda x, m: torch.func.jvp(torch.sin, (x,), (x,))[1], "a derivative"),
    "mse over everything": (lambda x, m: F.mse_loss(x, torch.zeros_like(x)), "mse_loss"),
}


def _write_a_position(x):
    y = x * 2
    y[:, 0].copy_(W)
    return y


def _write_through_a_reshape(x):
    y = x * 2
    y.view(H, H, 2, 2)[..., 0].copy_(y[..., :2])
    return y


def _scan_in_a_loop(a, b):
    h, states = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1)


def _scan_of_logarithms(a, b):
    decay = a.log().cumsum(1)
    return (b * (-decay).exp()).cumsum(1) * decay.exp()


def _associative_scan(a, b):
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    return associative_scan(combine, (a, b), dim=1, combine_mode="generic")[1]


@pytest.mark.parametrize("name", ACROSS_TOKENS)
def test_runs_unpacked_with_the_reason(name):
    function, op = ACROSS_TOKENS[name]
    mask = masks(["1111", "1110", "1100", "0110"])

    def after_a_mixer(x, mask):
        return function(packc.ops.causal_conv1d(x * mask[..., None], TAPS), mask)

    x, backend = torch.randn(H, H, H), RecordingBackend("eager")
    expected = after_a_mixer(x, mask)
    actual = torch.compile(after_a_mixer, backend=backend, fullgraph=True)(x, mask)
    torch.testing.assert_close(actual, expected)
    (reason,) = backend.reasons
    assert op in reason


def test_a_scan_in_a_loop_over_time_reads_stock_values():
    def after_a_mixer(x, mask):
        mixed = packc.ops.causal_conv1d(x * mask[..., None], TAPS)
        return _scan_in_a_loop(mixed.sigmoid(), mixed)

    x, mask = torch.randn(H, H, H), masks(["1111", "1110", "1100", "0110"])
    compiled = torch.compile(after_a_mixer, backend=RecordingBackend("eager"), fullgraph=True)
    torch.testing.assert_close(compiled(x, mask), after_a_mixer(x, mask))


def test_a_mixer_that_is_packed_already_is_left_alone():
    cu_seqlens = torch.tensor([0, 3, 8])

    def packed_by_hand(x, attention_mask):
        return packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS, cu_seqlens=cu_seqlens)

    x, mask, backend = torch.randn(1, 8, H), torch.ones(1, 8), RecordingBackend("eager")
    expected = packed_by_hand(x, mask)
    torch.testing.assert_close(torch.compile(packed_by_hand, backend=backend)(x, mask), expected)
    (reason,) = backend.reasons
    assert "already packed" in reason


def test_labels_that_the_model_computes_are_not_trusted():
    def distilled(x, mask):
        logits = packc.ops.causal_conv1d(x * mask[..., None], TAPS)
        return F.cross_entropy(logits.view(-1, H), logits.detach().argmax(-1).view(-1))

    x, mask, backend = torch.randn(H, H, H), masks(["1111", "1110", "1100", "0110"]), RecordingBackend("eager")
    torch.testing.assert_close(torch.compile(distilled, backend=backend)(x, mask), distilled(x, mask))
    (reason,) = backend.reasons
    assert "labels" in reason


def test_labels_that_are_not_row_by_row_are_not_asked_about():
    def time_first(x, mask, labels):
        return F.cross_entropy(packc.ops.causal_conv1d(x * mask[..., None], TAPS).permute(1, 2, 0), labels.T)

    x, mask, backend = torch.randn(3, H, H), masks(["1111", "1110", "1100"]), RecordingBackend("eager")
    labels = torch.randint(0, H, (3, H))
    torch.testing.assert_close(torch.compile(time_first, backend=backend)(x, mask, labels), time_first(x, mask, labels))
    (reason,) = backend.reasons
    assert "not row by row" in reason


def test_masked_pooling_is_a_boundary_and_not_a_fallback():
    def pooled(x, mask):
        y = packc.ops.causal_conv1d(x * mask[..., None], TAPS) * mask[..., None]
        return y.sum(1) / mask.sum(1, keepdim=True)

    x, mask = torch.randn(H, H, H), masks(["1111", "1110", "1100", "0110"])
    report = packc.explain(pooled)(x, mask)
    assert report.fallback is None
    (boundary,) = report.boundaries
    assert "sum" in boundary.node
    assert "L axis" in boundary.reason
    backend = RecordingBackend("eager")
    torch.testing.assert_close(torch.compile(pooled, backend=backend)(x, mask), pooled(x, mask))
    assert not backend.reasons


def test_a_mean_that_keeps_its_axes_keeps_its_shape():
    def function(x, attention_mask):
        return (mix(x) * attention_mask[..., None]).mean((0, 1, 2), keepdim=True)

    def mix(x):
        return packc.ops.causal_conv1d(x, TAPS)

    x, mask = torch.randn(3, 4, H), masks(["1111", "1100", "1000"])
    torch._dynamo.reset()
    got = torch.compile(function, backend="packc", options={"packc.inner": "aot_eager"})(x, mask)
    torch.testing.assert_close(got, function(x, mask))


def test_gradients_scaled_by_how_often_an_id_occurs_count_padding_too():
    table = nn.Embedding(3, H, scale_grad_by_freq=True)

    def function(ids, attention_mask):
        return (packc.ops.causal_conv1d(table(ids), TAPS) * attention_mask[..., None]).sum()

    ids, mask = torch.tensor([[0, 1, 1, 0], [2, 2, 1, 0]]), masks(["1111", "1100"])
    torch._dynamo.reset()
    fast = torch.compile(function, backend="packc", options={"packc.inner": "aot_eager"})
    got, want = (torch.autograd.grad(each(ids, mask), table.weight)[0] for each in (fast, function))
    torch.testing.assert_close(got, want)
