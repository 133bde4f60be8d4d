"""Every mixer of packc packs in a model of plain torch, by its declaration alone."""

import pytest
import torch
from harness import BOTH, LEFT, RIGHT, masks
from mixers import MIXERS, mixer

import packc
from packc.ops.mixer import MIXERS as DECLARED

STRICT = {"packc.inner": "aot_eager", "packc.strict": True}


ALL = {
    **MIXERS,
    "linear_attention_of_one_decay": mixer("linear_attention", {"g": "H"}),
    # With a bias, zero gives no zero.
    "causal_conv1d": mixer("causal_conv1d", without=("bias",)),
}
ENTERING = [(name, argument) for name, mixer in ALL.items() for argument in mixer.declaration.enter_state]
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
    assert {mixer.declaration.name for mixer in ALL.values()} | {attention} == set(DECLARED)


@pytest.mark.parametrize(("name", "masked"), ENTERING)
def test_a_mixer_packs_that_reads_nothing_of_padding(name, masked):
    torch.manual_seed(0)
    function, inputs = model(ALL[name], masked), ALL[name].make(3, 8)
    compiled = torch.compile(function, backend="packc", options=STRICT)
    for rows in (RIGHT, LEFT, BOTH):
        mask, before = masks(rows), packc.stats()["tokens"]
        expected, actual = outputs(function, mask, inputs), outputs(compiled, mask, inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert packc.stats()["tokens"] - before == mask.sum()


@pytest.mark.parametrize("name", ALL)
def test_what_a_mixer_makes_of_zeros_is_zero(name):
    mixer, inputs = ALL[name], ALL[name].make(2, 8)
    for argument in mixer.declaration.gives_zero:
        zeros_first = inputs[argument].clone()
        zeros_first[:, :5] = 0
        given = {**inputs, argument: zeros_first}
        assert mixer.function(**given, **mixer.options)[:, :5].eq(0).all()
        for other in mixer.declaration.unless:
            given |= {other: torch.ones_like(MIXERS[name].make(2, 8)[other])}
            assert mixer.function(**given, **mixer.options)[:, :5].ne(0).all()


def two_mixers(bias):
    def run(attention_mask, inputs):
        x = packc.ops.causal_conv1d(inputs["v"].flatten(2) * attention_mask[..., None], torch.ones(6, 2), bias)
        return packc.ops.gated_delta_rule(**{**inputs, "v": x.unflatten(-1, (2, 3))})

    return run


@pytest.mark.parametrize("bias", [None, torch.ones(6)], ids=["none", "a bias"])
def test_left_padding_that_is_zero_stays_out_of_a_mixer_after_a_mixer_without_bias(bias):
    torch.manual_seed(0)
    inputs, mask = MIXERS["gated_delta_rule"].make(3, 8), masks(LEFT)
    compiled = torch.compile(two_mixers(bias), backend="packc", options=STRICT)
    if bias is not None:
        with pytest.raises(packc.NotPacked, match="reads left padding"):
            compiled(mask, inputs)
        return
    expected = outputs(two_mixers(bias), mask, inputs)
    torch.testing.assert_close(outputs(compiled, mask, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_left_padding_that_a_mixer_reads_stays_in(name):
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
