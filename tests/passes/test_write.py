"""What a packed graph returns lies in memory as what the padded one returns."""

import pytest
import torch
from harness import BOTH, ONE_ROW, RecordingBackend, masks
from torch.nn import functional as F

import packc

H = 4
TAPS = torch.randn(H, 3, generator=torch.Generator().manual_seed(1))
STRICT = {"packc.inner": "aot_eager", "packc.strict": True}
OUTPUTS = {
    "as it is": lambda x: x * 2,
    "channels first": lambda x: F.conv1d(x.mT, TAPS[:, None], padding=2, groups=H)[..., : x.shape[1]].mT * 2,
    "transposed": lambda x: x.transpose(1, 2),
    "transposed and laid out": lambda x: x.transpose(1, 2).contiguous() + 1,
    "written over": lambda x: _over(x.mT.contiguous().mT * 2, x),
    "filled in place": lambda x: (x.mT.contiguous().mT * 2).masked_fill_(x > 0, 0.5),
    "time first": lambda x: (x.transpose(0, 1).contiguous() * 2).transpose(0, 1),
    "heads": lambda x: x.unflatten(-1, (2, 2)).transpose(1, 2),
}


def _over(x, other):
    x[..., :] = other[..., :1]
    return x


@pytest.mark.parametrize("rows", [BOTH, ONE_ROW], ids=["three rows", "one row"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_keep_size_and_strides(name, rows):
    def model(x, attention_mask):
        return OUTPUTS[name](packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS))

    mask = masks(rows)
    x = torch.randn(*mask.shape, H)
    got, want = torch.compile(model, backend="packc", options=STRICT)(x, mask), model(x, mask)
    strides = zip(got.stride(), want.stride(), want.shape, strict=True)
    assert got.shape == want.shape
    assert all(a == b for a, b, size in strides if size > 1), (got.stride(), want.stride())


def test_an_output_that_stays_padded_keeps_its_strides_too():
    def model(x, attention_mask, other):
        # Of the other rows no mask speaks: their convolution becomes packc's, whose result lies otherwise in memory.
        convolved = F.conv1d(F.pad(other.mT, (2, 0)), TAPS[:, None], groups=H)
        return packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS), convolved.mT, convolved.cos()

    mask = masks(BOTH)
    given = torch.randn(*mask.shape, H), mask, torch.randn(2, 5, H)
    options = {**STRICT, "packc.strict": False}
    got, want = torch.compile(model, backend="packc", options=options)(*given), model(*given)
    assert [each.stride() for each in got] == [each.stride() for each in want]


def test_a_table_of_positions_is_gathered_once_for_all_layers():
    """To which each adds axes of its own, as for heads."""

    def model(x, attention_mask):
        angles = torch.arange(x.shape[1])[:, None] * torch.linspace(0, 1, 2)
        for table in (angles.cos(), angles.sin(), angles.cos()):
            heads = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS).unflatten(-1, (2, 2))
            x = (heads * table.unsqueeze(0).unsqueeze(2) + table.unsqueeze(1)).flatten(2)
        return x * attention_mask[..., None]

    recorder = RecordingBackend()
    mask = masks(BOTH)
    x = torch.randn(*mask.shape, H)
    torch.testing.assert_close(torch.compile(model, backend=recorder)(x, mask), model(x, mask))
    assert recorder.op_count(torch.ops.aten.index_select.default) == 3


WHOLES = {
    "a state": lambda x: packc.ops.causal_conv1d(x, TAPS[:, :2], output_final_state=True)[1] * x,
    "a sum": lambda x: x.mT + x.sum((0, 1)),
}


@pytest.mark.parametrize("name", WHOLES)
def test_what_has_no_token_axes_may_lie_along_tokens(name):
    def model(x, attention_mask):
        return WHOLES[name](packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS) * attention_mask[..., None])

    mask = masks(["1111", "0111", "0011"])
    x = torch.randn(3, H, H)
    got, want = (f(x, mask) for f in (torch.compile(model, backend="packc", options=STRICT), model))
    real = mask.bool()[..., None] if name == "a state" else mask.bool()[:, None]
    torch.testing.assert_close(got.where(real, 0), want.where(real, 0))


def test_a_state_that_is_broadcast_with_tokens_is_returned_as_a_state():
    """Of as many channels as there are positions, in one row: the broadcast state is the state itself."""
    taps = torch.randn(3, 4)

    def model(x, attention_mask):
        x = x * attention_mask[..., None]
        state = packc.ops.causal_conv1d(x, taps, output_final_state=True)[1]
        return torch.mul(*torch.broadcast_tensors(x, state)), state

    x, mask = torch.randn(1, 3, 3), masks(["011"])
    options = {**STRICT, "packc.strict": False}
    got, want = (f(x, mask)[1] for f in (torch.compile(model, backend="packc", options=options), model))
    torch.testing.assert_close(got, want)


VIEWS = {
    "features and positions": lambda x: x.mT.contiguous().view(x.shape[0], -1).tanh(),
    "rows and features": lambda x: x.transpose(0, 1).contiguous().view(x.shape[1], -1).sin(),
    "positions that are left": lambda x: (x[:, 1:] * 2).view(-1, 2, 2).sum(0),
    "heads of a product": lambda x: (TAPS[:2, :2] @ x.mT.unflatten(1, (2, 2))).view(x.shape[0], H, -1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_one_however_a_packed_value_lies_in_memory(name):
    def model(x, attention_mask):
        return VIEWS[name](packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS) * attention_mask[..., None])

    mask = masks(BOTH)
    x = torch.randn(*mask.shape, H)
    got, want = (f(x, mask) for f in (torch.compile(model, backend="packc", options=STRICT), model))
    torch.testing.assert_close(got, want)


def test_what_is_cut_late_keeps_its_strides():
    def model(x, attention_mask):
        x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS) * attention_mask[..., None]
        return x[:, 1:].sin()

    mask = masks(BOTH)
    x = torch.randn(*mask.shape, H)
    options = {**STRICT, "packc.strict": False}
    got, want = (f(x, mask) for f in (torch.compile(model, backend="packc", options=options), model))
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want)


def test_memory_that_is_read_by_strides_is_the_models():
    def model(x, attention_mask):
        x = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS) * attention_mask[..., None]
        return x.mT.contiguous().as_strided((3, H), (H * x.shape[1], 1))

    mask = masks(BOTH)
    x = torch.randn(*mask.shape, H)
    options = {**STRICT, "packc.strict": False}
    got, want = (f(x, mask) for f in (torch.compile(model, backend="packc", options=options), model))
    torch.testing.assert_close(got, want)
    assert "reads memory by strides" in packc.explain(model)(x, mask).fallback
