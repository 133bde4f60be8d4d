"""What every mixer promises, on every implementation. Chunks have 64 tokens: lengths lie on both sides of that."""

import pytest
import torch
from budget import skip_if_interpreted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from implementations import implementation
from mixers import MIXERS, assert_close, exactly, in_dtype, only, positions, run
from selective_scan_data import offsets, relative_error

from packc import config

pytestmark = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)

few = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def states(mixer, documents):
    return torch.randn(documents, *mixer.state)


def random_dout(mixer, inputs):
    with config.patch(kernels="reference"):
        return torch.randn_like(mixer.function(**inputs, **mixer.options))


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[70], [5, 0, 64, 1, 0, 65], [129]])
def test_documents_agree_with_the_fp64_reference(mixer, kernels, lengths):
    if len(lengths) == 1:
        skip_if_interpreted(kernels)
    inputs, state = mixer.make(1, sum(lengths)), states(mixer, len(lengths))
    assert_close(run(mixer, inputs, offsets(lengths), state), exactly(mixer, inputs, offsets(lengths), state))


def test_rows_agree_with_the_fp64_reference(mixer, kernels):
    inputs, state = mixer.make(2, 65), states(mixer, 2)
    assert_close(run(mixer, inputs), exactly(mixer, inputs))
    if kernels != "triton":
        assert_close(run(mixer, inputs, None, state), exactly(mixer, inputs, None, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_lose_no_more_than_a_plain_implementation(mixer, kernels, dtype):
    if dtype == torch.float16:
        skip_if_interpreted(kernels)
    inputs = in_dtype(mixer, mixer.make(1, 70), dtype)
    given = {"dout": random_dout(mixer, inputs), "dfinal": states(mixer, 1)}
    exact, results = exactly(mixer, inputs, **given), run(mixer, inputs, **given)
    # The plain implementation: fp32 inside, every result rounded once.
    with config.patch(kernels="reference"):
        plain = run(mixer, {name: x.float() for name, x in inputs.items()}, **given)
    for name, x in results.items():
        if name[1:] in inputs:
            assert x.dtype == inputs[name[1:]].dtype, name
        rounded = relative_error(plain[name].to(x.dtype), exact[name])
        # Interpreted, Triton truncates to bf16.
        slack = torch.finfo(x.dtype).eps / 2 if kernels == "triton" else 0
        assert relative_error(x, exact[name]) <= max(2 * rounded + slack, 1e-5), name


def test_final_states_are_fp32_or_fp64(mixer, kernels):
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        assert run(mixer, in_dtype(mixer, mixer.make(1, 3), dtype))["final_state"].dtype == expected


def test_either_output_alone_has_gradients(mixer, kernels):
    inputs, state = mixer.make(1, 70), states(mixer, 1)
    zero_out, zero_state = torch.zeros_like(random_dout(mixer, inputs)), torch.zeros_like(state)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()} | {"initial_state": state.requires_grad_()}
    out, final = mixer.function(**leaves, **mixer.options, output_final_state=True)
    for result, zeros in [(out, {"dfinal": zero_state}), (final, {"dout": zero_out})]:
        weight = torch.randn_like(result)
        given = {"dout": weight} if result is out else {"dfinal": weight}
        grads = torch.autograd.grad(result, list(leaves.values()), weight, retain_graph=True, materialize_grads=True)
        exact = exactly(mixer, inputs, None, state, **zeros, **given)
        for name, grad in zip(leaves, grads, strict=True):
            scale = exact[f"d{name}"].abs().max().clamp_min(1e-3)
            assert ((grad - exact[f"d{name}"]).abs().max() / scale) < 1e-5, name


def test_gradcheck(mixer):
    inputs = {name: x.double().requires_grad_() for name, x in mixer.make(1, 6).items()}
    state = states(mixer, 3).double().requires_grad_()

    def call(state, *values):
        named = dict(zip(inputs, values, strict=True))
        return mixer.function(
            **named, **mixer.options, cu_seqlens=offsets([2, 0, 4]), initial_state=state, output_final_state=True
        )

    assert torch.autograd.gradcheck(call, (state, *inputs.values()), fast_mode=True)


def test_triton_needs_nothing_of_the_cpp_kernels(mixer, monkeypatch):
    monkeypatch.setattr(torch.ops, "packc_cpu", None)
    with implementation("triton"):
        run(mixer, mixer.make(1, 1))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_strided_inputs_equal_contiguous_ones(mixer, kernels):
    lengths = [3, 17] if kernels == "triton" else [3, 67]
    inputs, documents = mixer.make(1, sum(lengths)), offsets(lengths)
    views = [
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
        lambda x: torch.cat([torch.full_like(x, torch.nan), x], -1)[..., x.shape[-1] :],
    ]
    dout = random_dout(mixer, inputs)
    expected = run(mixer, inputs, documents, dout=dout)
    for view in views[1:2] if kernels == "triton" else views:
        strided = {name: view(x) if x.ndim > 1 else x for name, x in inputs.items()}
        results = run(mixer, strided, documents, dout=dout.transpose(1, 2).contiguous().transpose(1, 2))
        # Not to the bit: where torch has a part in it, sums may be taken in another order.
        assert_close(results, expected)


def test_tokens_in_front_of_a_view_and_behind_it_are_not_read(mixer, kernels):
    skip_if_interpreted(kernels)
    inputs, documents = mixer.make(1, 67), offsets([2, 65])
    surrounded = dict(inputs)
    for name in mixer.per_token():
        beyond = torch.full_like(inputs[name][:, :3], torch.nan)
        surrounded[name] = torch.cat([beyond, inputs[name], beyond], 1)[:, 3:-3]
    assert_close(run(mixer, surrounded, documents), run(mixer, inputs, documents), 0)


def test_rows_may_lie_more_than_two_to_the_31_elements_apart(mixer, kernels):
    inputs = mixer.make(2, 5)
    memory, used = torch.empty(2**31 + 2**16), 0  # of which two pages are ever touched
    far = dict(inputs)
    for name in mixer.per_token():
        x = inputs[name]
        far[name] = memory.as_strided(x.shape, (2**31, *x.stride()[1:]), used).copy_(x)
        used += x[0].numel()
    assert_close(run(mixer, far), run(mixer, inputs), 1e-6)


def test_runs_are_bitwise_reproducible_for_any_number_of_threads(mixer, kernels):
    if kernels == "reference":
        pytest.skip("plain torch promises no such thing")
    if kernels == "triton":
        pytest.skip("interpreted, by one thread")
    inputs, documents, threads = mixer.make(1, 150), offsets([3, 140, 7]), torch.get_num_threads()
    first = run(mixer, inputs, documents)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_close(run(mixer, inputs, documents), first, 0)
    finally:
        torch.set_num_threads(threads)


# ---- documents -------------------------------------------------------------------------------------------------------


def assert_packed_equals_each_document_alone(mixer, kernels, lengths, wide=False):
    L = sum(lengths)
    torch.manual_seed(L)
    inputs, state = mixer.make(1, L), states(mixer, len(lengths))
    cu_seqlens = offsets(lengths, torch.int64 if wide else torch.int32)
    dout, dfinal = random_dout(mixer, inputs), states(mixer, len(lengths))
    packed = run(mixer, inputs, cu_seqlens, state, dout, dfinal)
    parts = [
        run(mixer, only(mixer, inputs, span), None, state[n : n + 1], dout[:, span], dfinal[n : n + 1])
        for n, span in enumerate(positions(lengths))
    ]
    for name, result in packed.items():
        alone = [part[name] for part in parts]
        if name.endswith("state"):
            expected = torch.cat(alone)
        elif name == "out" or name[1:] in mixer.per_token():
            expected = torch.cat(alone, 1)
        else:
            expected = sum(alone)
        assert_close({name: result}, {name: expected}, 1e-5 if kernels == "reference" else 3e-6)


def test_packed_equals_each_document_alone(mixer, kernels):
    skip_if_interpreted(kernels)
    assert_packed_equals_each_document_alone(mixer, kernels, [5, 0, 65])


@few
@given(lengths=st.lists(st.sampled_from([0, 1, 5, 63, 64, 65, 130]), min_size=1, max_size=4), wide=st.booleans())
def test_any_packed_documents_equal_each_alone(mixer, kernels, lengths, wide):
    skip_if_interpreted(kernels)
    assert_packed_equals_each_document_alone(mixer, kernels, lengths, wide)


def assert_a_document_goes_on_from_its_state(mixer, first, second):
    L = first + second
    torch.manual_seed(L)
    state = states(mixer, 1)
    leaves = {name: x.requires_grad_() for name, x in mixer.make(1, L).items()}
    options = {**mixer.options, "output_final_state": True}
    whole = mixer.function(**leaves, **options, initial_state=state)
    head, carried = mixer.function(**only(mixer, leaves, slice(0, first)), **options, initial_state=state)
    tail, final = mixer.function(**only(mixer, leaves, slice(first, L)), **options, initial_state=carried)
    cut = torch.cat([head, tail], 1), final
    assert_close(dict(enumerate(cut)), dict(enumerate(whole)))
    weights = [torch.randn_like(x) for x in whole]
    expected = torch.autograd.grad(whole, list(leaves.values()), weights)
    results = torch.autograd.grad(cut, list(leaves.values()), weights)
    assert_close(dict(zip(leaves, results, strict=True)), dict(zip(leaves, expected, strict=True)))


def test_a_document_cut_in_two_goes_on_from_its_state(mixer, kernels):
    skip_if_interpreted(kernels)
    assert_a_document_goes_on_from_its_state(mixer, 3, 64)


@few
@given(first=st.sampled_from([0, 1, 63, 64, 65]), second=st.sampled_from([0, 1, 62, 64]))
def test_a_document_cut_anywhere_goes_on_from_its_state(mixer, kernels, first, second):
    skip_if_interpreted(kernels)
    assert_a_document_goes_on_from_its_state(mixer, first, second)


def test_permuting_documents_permutes_the_results(mixer, kernels):
    skip_if_interpreted(kernels)
    lengths, order = [5, 66, 1], [2, 0, 1]
    inputs = mixer.make(1, sum(lengths))
    dout, dfinal = random_dout(mixer, inputs), states(mixer, 3)
    index = torch.cat([torch.arange(72)[positions(lengths)[n]] for n in order])
    results = run(mixer, inputs, offsets(lengths), dout=dout, dfinal=dfinal)
    moved = only(mixer, inputs, index)
    permuted = run(mixer, moved, offsets([lengths[n] for n in order]), dout=dout[:, index], dfinal=dfinal[order])
    for name in ("out", *(f"d{name}" for name in mixer.per_token())):
        assert_close({name: permuted[name]}, {name: results[name][:, index]}, 1e-6 if kernels == "reference" else 0)
    assert_close({"final": permuted["final_state"]}, {"final": results["final_state"][order]})


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nothing_in_one_document_changes_another_by_one_bit(mixer, kernels, poison):
    if poison == torch.inf:
        skip_if_interpreted(kernels)
    # Long enough that threads leave chunks of the bad document behind, and carry states through those of another.
    lengths = [3, 66, 0, 5] if kernels == "triton" else [3, 130, 0, 200]
    bad = slice(3, 3 + lengths[1])
    inputs, state = mixer.make(1, sum(lengths)), states(mixer, 4)
    others = [t for t in range(sum(lengths)) if not bad.start <= t < bad.stop]
    clean = run(mixer, inputs, offsets(lengths), state)
    one_by_one = [(name,) for name in (*mixer.per_token(), "initial_state")]
    for names in [(*mixer.per_token(), "initial_state")] if kernels == "triton" else one_by_one:
        poisoned, poisoned_state = {key: x.clone() for key, x in inputs.items()}, state.clone()
        for name in names:
            if name == "initial_state":
                poisoned_state[1] = poison
            else:
                poisoned[name][:, bad] = poison
        results = run(mixer, poisoned, offsets(lengths), poisoned_state)
        for key in ("out", *(f"d{key}" for key in mixer.per_token())):
            assert torch.equal(results[key][:, others], clean[key][:, others]), (names, key)
        for key in ("final_state", "dinitial_state"):
            assert torch.equal(results[key][[0, 2, 3]], clean[key][[0, 2, 3]]), (names, key)
        assert not torch.equal(results["out"], clean["out"]), names


@pytest.mark.parametrize("lengths", [[0, 0], [0]])
def test_no_tokens_at_all(mixer, kernels, lengths):
    inputs, state = mixer.make(1, 0), states(mixer, len(lengths))
    dfinal = torch.randn_like(state)
    results = run(mixer, inputs, offsets(lengths), state, dfinal=dfinal)
    assert results["out"].shape[:2] == (1, 0)
    assert torch.equal(results["final_state"], state)
    assert torch.equal(results["dinitial_state"], dfinal)


@pytest.mark.parametrize("lengths", [[19], [21], [25, -5], []])
def test_offsets_that_do_not_cover_the_tokens_raise(mixer, kernels, lengths):
    if kernels == "gpu":
        pytest.skip("their values are on the device, where nobody looks")
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to L = 20"):
        mixer.function(**mixer.make(1, 20), **mixer.options, cu_seqlens=offsets(lengths))


# ---- the compiler ----------------------------------------------------------------------------------------------------


def test_one_compilation_serves_every_length_and_number_of_documents(mixer):
    def loss(inputs, cu_seqlens, state):
        out, final = mixer.function(
            **inputs, **mixer.options, cu_seqlens=cu_seqlens, initial_state=state, output_final_state=True
        )
        return out.square().sum() + final.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, lengths in enumerate([[30, 40, 0, 1, 1, 1], [100, 0, 65, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7, 8]]):
        inputs = {name: x.requires_grad_() for name, x in mixer.make(1, sum(lengths)).items()}
        state = states(mixer, len(lengths)).requires_grad_()
        leaves = [*inputs.values(), state]
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            results = torch.autograd.grad(compiled(inputs, offsets(lengths), state), leaves)
        expected = torch.autograd.grad(loss(inputs, offsets(lengths), state), leaves)
        assert_close(dict(enumerate(results)), dict(enumerate(expected)))


# ---- batch invariance ------------------------------------------------------------------------------------------------

# A document of more than two chunks, and of less than one; others move their chunks' and blocks' boundaries.
_DOCUMENT = 133
_AROUND = {"alone": ([], []), "first": ([], [70, 3]), "last": ([5, 66], []), "among others": ([1, 64, 0, 9], [61, 200])}


def as_kernels_alone(mixer, kernels):
    """Without what torch computes around a kernel: on the CPU it rounds an array's last elements unlike the rest."""
    if mixer is not MIXERS["ssd"]:
        return mixer

    def make(B, L):
        return {name: x for name, x in mixer.make(B, L).items() if (name, kernels) != ("z", "triton")}

    return mixer._replace(make=make, options={**mixer.options, "dt_softplus": False})


def result_of(mixer, document, before, after):
    """What a document gives between others: its results, and the gradients of all that it has of its own."""
    lengths = [*before, document["out"].shape[1], *after]
    start, number = sum(before), len(before)
    inputs, state = mixer.make(1, sum(lengths)), states(mixer, len(lengths))
    span = slice(start, start + document["out"].shape[1])
    for name, x in document["inputs"].items():
        if name in mixer.per_token():
            inputs[name][:, span] = x
        else:
            inputs[name] = x
    state[number] = document["state"][0]
    dout, dfinal = torch.randn(1, sum(lengths), *document["out"].shape[2:]), torch.randn_like(state)
    dout[:, span], dfinal[number] = document["out"], document["final"][0]
    results = run(mixer, inputs, offsets(lengths), state, dout, dfinal)
    return {
        name: value[number] if name.endswith("state") else value[:, span]
        for name, value in results.items()
        if name.endswith("state") or name == "out" or name[1:] in mixer.per_token()
    }


@pytest.mark.parametrize("length", [_DOCUMENT, 7])
def test_a_document_gives_the_same_bits_among_any_others(mixer, kernels, length):
    if kernels == "reference":
        pytest.skip("plain torch promises no such thing")
    if length == 7:
        skip_if_interpreted(kernels)
    mixer, around = as_kernels_alone(mixer, kernels), _AROUND
    if kernels == "triton":
        around, length = {"alone": ([], []), "among others": ([3, 0], [2])}, 7 if length == 7 else 66
    document = {"inputs": mixer.make(1, length), "state": states(mixer, 1), "final": states(mixer, 1)}
    document["out"] = random_dout(mixer, document["inputs"])
    expected, *others = [result_of(mixer, document, *each) for each in around.values()]
    differing = [
        (where, name)
        for where, results in zip(list(around)[1:], others, strict=True)
        for name, value in results.items()
        if not torch.equal(value, expected[name])
    ]
    assert not differing
