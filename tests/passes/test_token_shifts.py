"""A shift along the tokens, however it is written, gives each document's first token what stands in front of a row."""

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, RecordingBackend, code, masks
from rows import assert_documents_are_apart
from torch import nn
from torch.nn import functional as F

import packc
from packc.passes import Graph, fakify, token_shifts
from packc.passes.zeros import is_constant_zero
from packc.pipeline import READ

TestCase = pytest.importorskip("expecttest").TestCase  # not on every machine that has a GPU

D = 4
CONV = torch.ops.packc.causal_conv1d.default
STRICT = {"packc.inner": "aot_eager", "packc.strict": True}


class Model(nn.Module):
    def __init__(self, shift):
        super().__init__()
        torch.manual_seed(0)
        self.shift, self.linear, self.biased = shift, nn.Linear(D, D, bias=False), nn.Linear(D, D)
        self.first = nn.Parameter(torch.randn(D))
        self.double()

    def forward(self, x, attention_mask=None):
        x = x if attention_mask is None else x * attention_mask[..., None]
        return F.silu(self.shift(self, x) * 2 + x)


def joined(model, x):
    return torch.cat([x.new_zeros(x.shape[0], 1, D), x[:, :-1]], dim=1)


def joined_by_two(model, x):
    return torch.cat([torch.zeros_like(x[:, :2]), x[:, :-2]], 1)


def joined_and_cut(model, x):
    return torch.cat([torch.zeros(x.shape[0], 1, D, dtype=x.dtype), x], 1)[:, :-1]


def joined_with_a_layer_of_zeros(model, x):
    first = model.linear(x.new_zeros(x.shape[0], 1, D))
    return torch.cat([first, model.linear(x)[:, :-1]], 1)


def joined_with_its_own_bias(model, x):
    first = model.biased(x.new_zeros(x.shape[0], 1, D))
    return torch.cat([first, model.biased(x)[:, :-1]], 1)


def padded_and_cut(model, x):
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def padded_and_cut_to_length(model, x):
    return F.pad(x, (0, 0, 1, 0))[:, : x.shape[1]]


def padded_by_less(model, x):
    return nn.ZeroPad2d((0, 0, 1, -1))(x)


def rolled(model, x):
    y = x.roll(1, dims=1)
    y[:, 0] = 0
    return y


def rolled_by_two(model, x):
    y = x.roll(2, 1)
    y[:, :2] = 0
    return y


def taps(model, x):
    padded = F.pad(x, (0, 0, 2, 0))
    return sum(padded[:, k : k + x.shape[1]] * (k + 1) for k in range(3))


def channels_first(model, x):
    return F.pad(x.mT, (1, 0))[..., :-1].mT


def of_every_head(model, x):
    return F.pad(x.unflatten(-1, (2, 2)).transpose(1, 2), (0, 0, 1, -1)).transpose(1, 2).flatten(2)


def of_numbers(model, x):
    return F.pad(x[..., 0], (1, -1))[..., None]


SHIFTS = [
    joined,
    joined_by_two,
    joined_and_cut,
    joined_with_a_layer_of_zeros,
    joined_with_its_own_bias,
    padded_and_cut,
    padded_and_cut_to_length,
    padded_by_less,
    rolled,
    rolled_by_two,
    taps,
    channels_first,
    of_every_head,
    of_numbers,
]


def joined_with_a_parameter(model, x):
    return torch.cat([model.first.expand(x.shape[0], 1, D), x[:, :-1]], 1)


def looking_ahead(model, x):
    return F.pad(x, (0, 0, -1, 1))


def rolled_alone(model, x):
    return x.roll(1, 1)


def rolled_and_cleared_behind(model, x):
    y = x.roll(1, 1)
    y[:, -1] = 0
    return y


def padded_with_ones(model, x):
    return F.pad(x, (0, 0, 1, 0), value=1.0)[:, :-1]


def of_what_differs_by_row(model, x):
    return torch.cat([x[:, -1:], x[:, :-1]], 1)


def one_too_far(model, x):
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)


def joined_with_an_argument(model, x):
    return torch.cat([x[:, :1].sum((0, 1)).expand(x.shape[0], 1, D), x[:, :-1]], 1)


def of_another_layer(model, x):
    return torch.cat([model.biased(x.new_zeros(x.shape[0], 1, D)), model.linear(x)[:, :-1]], 1)


OTHERS = [
    looking_ahead,
    rolled_alone,
    rolled_and_cleared_behind,
    padded_with_ones,
    of_what_differs_by_row,
    one_too_far,
    joined_with_an_argument,
    of_another_layer,
]


def of_features(model, x):
    return F.pad(x, (1, -1))


OTHER_SPELLINGS = [joined_by_two, joined_and_cut, padded_and_cut_to_length, padded_and_cut, rolled_by_two, of_numbers]


def quick(shifts, but):
    return [pytest.param(each, marks=pytest.mark.slow) if each in but else each for each in shifts]


def results(call, model, x, mask):
    out = call(x, mask)[mask.bool()]
    wanted = [x, *model.parameters()]
    return out, *torch.autograd.grad(out.sin().sum(), wanted, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("shift", quick(SHIFTS, but=OTHER_SPELLINGS), ids=lambda shift: shift.__name__)
def test_it_packs(shift):
    model = Model(shift)
    compiled = torch.compile(model, backend="packc", options=STRICT)
    for rows in (RIGHT, LEFT, BOTH):
        x, mask = torch.randn(3, 8, D, dtype=torch.float64, requires_grad=True), masks(rows)
        torch.testing.assert_close(results(compiled, model, x, mask), results(model, model, x, mask))
    report = packc.explain(model)(x, mask)
    assert {mixer.packed for mixer in report.mixers} == {True}
    assert not report.boundaries


@pytest.mark.parametrize("shift", OTHERS, ids=lambda shift: shift.__name__)
def test_what_is_none_stays(shift):
    model = Model(shift)
    backend, x, mask = RecordingBackend(), torch.randn(3, 8, D, dtype=torch.float64, requires_grad=True), masks(RIGHT)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(results(compiled, model, x, mask), results(model, model, x, mask))
    assert not backend.after or backend.op_count(CONV) == 0


def test_along_features_it_is_no_mixer():
    backend, x, mask = RecordingBackend(), torch.randn(3, 8, D, dtype=torch.float64), masks(RIGHT)
    torch.compile(Model(of_features), backend=backend)(x, mask)
    assert backend.op_count(CONV) == 0


def test_a_parameter_stands_in_front_of_rows_that_are_not_padded_on_the_left():
    model = Model(joined_with_a_parameter)
    compiled = torch.compile(model, backend="packc", options={"packc.inner": "aot_eager"})
    for rows in (RIGHT, LEFT):
        x, mask = torch.randn(3, 8, D, dtype=torch.float64, requires_grad=True), masks(rows)
        torch.testing.assert_close(results(compiled, model, x, mask), results(model, model, x, mask))
    report = packc.explain(model)(x, mask)
    assert report.tokens == mask.numel()  # stock's first token reads its padding, not the parameter


def test_what_is_not_masked_keeps_left_padding():
    def run(x, attention_mask):
        return F.silu(padded_by_less(None, x)) * attention_mask[..., None]

    compiled = torch.compile(run, backend="packc", options={"packc.inner": "aot_eager"})
    x, mask = torch.randn(3, 8, D), masks(LEFT)
    with pytest.warns(UserWarning, match="left padding: x is not masked"):
        out = compiled(x, mask)
    torch.testing.assert_close(out, run(x, mask))


@pytest.mark.parametrize(
    "shift", quick([*SHIFTS, joined_with_a_parameter], but=SHIFTS[1:]), ids=lambda shift: shift.__name__
)
def test_nothing_passes_from_document_to_document(shift):
    assert_documents_are_apart(Model(shift), torch.randn(2, 8, D, dtype=torch.float64), options=STRICT)


def recurrent(x, attention_mask=None):
    """As rwkv is: a shift, and a scan that no op has."""
    x = x if attention_mask is None else x * attention_mask[..., None]
    mixed, state, states = x + padded_by_less(None, x).sigmoid(), x.new_zeros(x.shape[0], D), []
    for t in range(x.shape[1]):
        state = state * mixed[:, t].sigmoid() + mixed[:, t]
        states.append(state)
    return F.silu(torch.stack(states, 1) * x)


def test_what_runs_padded_behind_one_reads_it_padded():
    compiled = torch.compile(recurrent, backend="packc", options={"packc.inner": "aot_eager"})
    x = torch.randn(3, 8, D, dtype=torch.float64)
    for rows in (RIGHT, LEFT):
        mask = masks(rows)
        torch.testing.assert_close(compiled(x, mask)[mask.bool()], recurrent(x, mask)[mask.bool()])
    report = packc.explain(recurrent)(x, mask)
    assert report.tokens == mask.sum()
    assert [boundary.node for boundary in report.boundaries][:1] == ["aten.select.int"]
    with (
        packc.documents(cu_seqlens=torch.tensor([0, 3, 8, 16, 24], dtype=torch.int32)),
        pytest.raises(packc.NotPacked, match="several documents in a row apart: .* shifts whole rows"),
    ):
        compiled(x, torch.ones_like(mask))


def test_a_layer_of_zeros_without_its_bias_has_autocasts_dtype():
    model = Model(joined_with_its_own_bias).float()
    x, mask = torch.randn(3, 8, D), masks(RIGHT)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = torch.compile(model, backend="packc", options=STRICT)(x, mask), model(x, mask)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0.02, atol=0.02)


def test_a_layer_with_a_bias_makes_no_zero_of_zeros():
    graph = torch.fx.Graph()
    zero, weight, bias = graph.call_function(torch.ops.aten.zeros.default, ([1, D],)), *map(graph.placeholder, "wb")
    assert is_constant_zero(graph.call_function(torch.ops.aten.linear.default, (zero, weight)))
    assert not is_constant_zero(graph.call_function(torch.ops.aten.linear.default, (zero, weight, bias)))


class TestWhatIsWritten(TestCase):
    maxDiff = None

    def written(self, shift):
        found = []

        def record(gm, inputs):
            graph = Graph(gm, fakify(gm, inputs))
            for each in READ:
                graph = each(graph)
            (graph.mask,) = graph.masks
            found.append(
                code(token_shifts(graph).gm)
                .replace("causal_conv1d_default", "conv")
                .replace("constant_pad_nd_default", "taps")
            )
            return gm.forward

        torch._dynamo.reset()
        model, x = Model(shift), torch.randn(3, 8, D, dtype=torch.float64)
        torch.compile(lambda x, mask: shift(model, x * mask[..., None]), backend=record)(x, masks(RIGHT))
        return found[0]

    def test_behind_zeros(self):
        self.assertExpectedInline(
            self.written(joined),
            """\
unsqueeze = aten.unsqueeze.default(l_mask_, 2)
mul = aten.mul.Tensor(l_x_, unsqueeze)
ones_default = aten.ones.default((4, 1), dtype=torch.float64, device=cpu)
taps = aten.constant_pad_nd.default(ones_default, (0, 1))
conv = packc.causal_conv1d.default(mul, taps, None, None, None, None, False)
getitem = getitem(conv, 0)
return (getitem)""",
        )

    def test_behind_a_layer_of_zeros(self):
        self.assertExpectedInline(
            self.written(joined_with_its_own_bias),
            """\
unsqueeze = aten.unsqueeze.default(l_mask_, 2)
mul = aten.mul.Tensor(l_x_, unsqueeze)
linear_default = aten.linear.default(mul, l_model_modules_biased_parameters_weight_)
ones_default = aten.ones.default((4, 1), dtype=torch.float64, device=cpu)
taps = aten.constant_pad_nd.default(ones_default, (0, 1))
conv = packc.causal_conv1d.default(linear_default, taps, None, None, None, None, False)
getitem = getitem(conv, 0)
add_tensor = aten.add.Tensor(getitem, l_model_modules_biased_parameters_bias_)
return (add_tensor)""",
        )

    def test_behind_a_parameter(self):
        self.assertExpectedInline(
            self.written(joined_with_a_parameter),
            """\
unsqueeze = aten.unsqueeze.default(l_mask_, 2)
mul = aten.mul.Tensor(l_x_, unsqueeze)
ones_default = aten.ones.default((4, 1), dtype=torch.float64, device=cpu)
taps = aten.constant_pad_nd.default(ones_default, (0, 1))
conv = packc.causal_conv1d.default(mul, taps, None, None, None, None, False)
getitem = getitem(conv, 0)
slice_tensor = aten.slice.Tensor(mul, 2, 0, 1)
ones_like_default = aten.ones_like.default(slice_tensor)
ones_default_1 = aten.ones.default((1, 1), dtype=torch.float64, device=cpu)
taps_1 = aten.constant_pad_nd.default(ones_default_1, (0, 1))
conv_1 = packc.causal_conv1d.default(ones_like_default, taps_1, None, None, None, None, False)
getitem_1 = getitem(conv_1, 0)
eq_scalar = aten.eq.Scalar(getitem_1, 0)
where_self = aten.where.self(eq_scalar, l_model_parameters_first_, getitem)
return (where_self)""",
        )
