"""A loss from hidden states is that of the logits in between, in value and in gradient, and never holds all of them."""

import pytest
import torch
from implementations import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from packc.ops import linear_cross_entropy as module
from packc.ops.linear_cross_entropy import linear_cross_entropy

T, D, V = 11, 6, 13
OP, BACKWARD = torch.ops.packc.linear_cross_entropy.default, torch.ops.packc.linear_cross_entropy_bwd.default
OPTIONS = {
    "plain": {},
    "another ignored label": {"ignore_index": 3},
    "smoothed": {"label_smoothing": 0.1},
    "scaled": {"scale": 0.5},
    "capped": {"cap": 3.0},
    "all": {"label_smoothing": 0.2, "scale": 0.7, "cap": 2.0},
}


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Of four tokens at most, the last of which are fewer."""
    monkeypatch.setattr(module, "_TOKENS", 4)
    monkeypatch.setattr(module, "_LOGITS", 1)


def head(*, bias=True, dtype=torch.float32):
    tensors = [torch.randn(T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)]
    tensors += [torch.randn(V, dtype=dtype)] if bias else []
    labels = torch.randint(0, V, (T,))
    labels[3] = -100
    return [each.requires_grad_() for each in tensors], labels


def in_two_steps(x, weight, bias, labels, *, scale=1.0, cap=0.0, **options):
    logits = F.linear(x, weight, bias) * scale
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return F.cross_entropy(logits, labels, reduction="none", **options)


def results(loss, tensors, labels, weights, **options):
    """Losses, and gradients of a sum of them."""
    losses = loss(*tensors, *[None] * (3 - len(tensors)), labels, **options)
    return [losses, *torch.autograd.grad((losses.double() * weights).sum(), tensors)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_equals_the_two_steps(dtype, bias, options):
    tensors, labels = head(bias=bias, dtype=dtype)
    labels = labels.clamp(min=0) if "ignore_index" in OPTIONS[options] else labels
    weights = torch.randn(T, dtype=torch.float64)
    found = results(linear_cross_entropy, tensors, labels, weights, **OPTIONS[options])
    exact_head = [each.detach().double().requires_grad_() for each in tensors]
    exact = results(in_two_steps, exact_head, labels, weights, **OPTIONS[options])
    stock = results(in_two_steps, tensors, labels, weights, **OPTIONS[options])
    assert found[0].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    for value, expected, two_steps in zip(found, exact, stock, strict=True):
        own, of_stock = ((each.double() - expected).abs().max().item() for each in (value, two_steps))
        least = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
        assert own <= max(2 * of_stock, least * expected.abs().max().item())


def test_ignored_labels_alone_have_no_loss_and_no_gradient():
    tensors, labels = head()
    losses, *grads = results(linear_cross_entropy, tensors, labels.fill_(-100), torch.ones(T))
    assert all(each.eq(0).all() for each in (losses, *grads))


def test_a_weights_gradient_in_low_precision_is_summed_in_fp32():
    """1 in the first chunk, and in hundreds of others what bf16 would drop."""
    x = torch.full((1200, 1), 2.0**-9, dtype=torch.bfloat16)
    x[0] = 1
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(x, weight, None, torch.zeros(1200, dtype=torch.int64)).sum().backward()
    torch.testing.assert_close(
        weight.grad.double(), 0.5 * x.double().sum() * torch.tensor([[-1.0], [1.0]]).double(), rtol=2**-8, atol=0
    )


def test_derivatives_of_the_second_order_are_right():
    tensors, labels = head(dtype=torch.float64)
    options = OPTIONS["all"]
    assert torch.autograd.gradgradcheck(lambda *given: linear_cross_entropy(*given, labels, **options), tensors)


def test_opcheck():
    tensors, labels = head()
    rest = (labels, -100, 0.1, 0.7, 2.0)
    opcheck("cpu", OP, (*tensors, *rest))
    losses, logsumexp = OP(*tensors, *rest)
    opcheck("cpu", BACKWARD, (torch.randn_like(losses), logsumexp, *tensors, *rest, [True, True, True]))
    opcheck("cpu", BACKWARD, (torch.randn_like(losses), logsumexp, *tensors[:2], None, *rest, [True, False, False]))


def test_under_autocast_it_is_that_of_a_linear_layer_under_autocast():
    tensors, labels = head()
    weights = torch.randn(T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(linear_cross_entropy, tensors, labels, weights)
        stock = results(in_two_steps, tensors, labels, weights)
    torch.testing.assert_close(found[0], stock[0])
    for value, expected in zip(found[1:], stock[1:], strict=True):
        assert value.dtype is expected.dtype
        assert (value - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_logits_of_all_tokens_never_exist():
    tokens, classes = 400, 300
    x, weight = torch.randn(tokens, D, requires_grad=True), torch.randn(classes, D, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as record:
        linear_cross_entropy(x, weight, None, torch.zeros(tokens, dtype=torch.int64)).sum().backward()
    largest = max(event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]")
    assert largest < tokens * classes * 4 / 10


def test_flops_are_those_of_its_products():
    tensors, labels = head(bias=False)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(*tensors, None, labels).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * T * D * V
