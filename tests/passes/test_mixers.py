"""Every mixer of packc packs in a model of plain torch, by its declaration alone."""

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, masks
from mixers import MIXERS, Mixer

import packc
from packc.ops.mixer import MIXERS as DECLARED

STRICT = {"packc.inner": "aot_eager", "packc.strict": True}


def convolution(B, L, D=4, W=3):
    return {"x": torch.randn(B, L, D), "weight": torch.randn(D, W)}


def scan(B, L, D=4, N=3):
    (u, delta, z), (projection_in, projection_out) = torch.randn(3, B, L, D), torch.randn(2, B, L, N)
    return {"u": u, "delta": delta, "A": -torch.rand(D, N), "B": projection_in, "C": projection_out, "z": z}


def retention(B, L):
    return MIXERS["linear_attention"].make(B, L) | {"g": -torch.rand(2)}


def declared(mixer):
    return DECLARED[mixer.function.__name__]


ALL = {
    **MIXERS,
    "linear_attention_of_one_decay": Mixer(packc.ops.linear_attention, retention, (2, 5, 3)),
    "causal_conv1d": Mixer(packc.ops.causal_conv1d, convolution, (4, 2)),
    "selective_scan": Mixer(packc.ops.selective_scan, scan, (4, 3), options={"delta_softplus": True}),
}
ENTERING = [(name, argument) for name, mixer in ALL.items() for argument in declared(mixer).enter_state]
# dt is made positive outside of the op: zero before is not zero after.
ENTERING.remove(("ssd", "dt"))


def model(mixer, masked):
    def run(attention_mask, inputs):
        real = attention_mask.view(*attention_mask.shape, *[1] * (inputs[masked].ndim - 2)) if masked else None
        given = {name: x * real if name == masked else x for name, x in inputs.items()}
        return mixer.function(**given, **mixer.options)

    return run


def outputs(function, mask, inputs):
    """What comes out at tokens, and the gradient of every input."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out = function(mask, leaves)[mask.bool()]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out, *torch.autograd.grad((out * weight).sum(), leaves.values())


def test_no_declaration_is_untried():
    attention = "varlen_attention"  # takes packed input only
    assert {declared(mixer).name for mixer in ALL.values()} | {attention} == set(DECLARED)


@pytest.mark.parametrize(("name", "masked"), ENTERING)
def test_a_mixer_packs_that_reads_nothing_of_padding(name, masked):
    torch._dynamo.reset()
    torch.manual_seed(0)
    function, inputs = model(ALL[name], masked), ALL[name].make(3, 8)
    compiled = torch.compile(function, backend="packc", options=STRICT)
    for rows in (RIGHT, LEFT, BOTH):
        mask = masks(rows)
        expected, actual = outputs(function, mask, inputs), outputs(compiled, mask, inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    report = packc.explain(function)(mask, inputs)
    assert [(mixer.packed, report.fallback) for mixer in report.mixers] == [(True, None)]
    assert report.tokens == mask.sum()


@pytest.mark.parametrize("name", ALL)
def test_left_padding_that_a_mixer_reads_stays_in(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    function, inputs = model(ALL[name], None), ALL[name].make(3, 8)

    def masked_after(attention_mask, inputs):
        out = function(attention_mask, inputs)
        return out * attention_mask.view(3, 8, *[1] * (out.ndim - 2))

    mask = masks(LEFT)
    compiled = torch.compile(masked_after, backend="packc", options={**STRICT, "packc.strict": False})
    with pytest.warns(UserWarning, match="reads left padding"):
        actual = outputs(compiled, mask, inputs)
    torch.testing.assert_close(actual, outputs(masked_after, mask, inputs), rtol=1e-4, atol=1e-5)
