"""Documents of a packed row do not know of each other; a document carried on after a cut does not know of the cut."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selective_scan_data import as_double, assert_all_close, make_inputs, offsets, scan_and_grads, tokens

from packc import config
from packc.ops import cpu_library, selective_scan

PER_TOKEN = ("out", "du", "ddelta", "dB", "dC", "dz")
SHARED = ("dA", "dD", "ddelta_bias")

# The C++ kernel treats a token alike wherever it lies. PyTorch's functions do not: the reference agrees to rounding.
BITWISE = 0 if cpu_library.load("selective_scan") else 1e-5

LENGTHS = st.lists(st.sampled_from([0, 1, 2, 3, 5, 31, 63, 64, 65, 130]), min_size=1, max_size=7)


def spans(lengths):
    return [slice(a, b) for a, b in pairwise(offsets(lengths).tolist())]


def each_alone(inputs, lengths, state, dout, dfinal):
    """Every document in a call of its own; what they share is summed."""
    parts = [
        scan_and_grads(tokens(inputs, span), None, state[n : n + 1], dout=dout[:, span], dfinal=dfinal[n : n + 1])
        for n, span in enumerate(spans(lengths))
    ]
    together = {name: torch.cat([part[name] for part in parts], 1) for name in PER_TOKEN}
    together |= {name: sum(part[name] for part in parts) for name in SHARED}
    return together | {name: torch.cat([part[name] for part in parts]) for name in ("final_state", "dinitial_state")}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=LENGTHS, wide=st.booleans())
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_packed_equals_each_document_alone(kernels, lengths, wide):
    L, D, N = sum(lengths), 19, 5
    if kernels == "reference" and L > 200:
        lengths = lengths[:1]
        L = sum(lengths)
    torch.manual_seed(L)
    inputs, state = make_inputs(L=L, D=D, N=N), torch.randn(len(lengths), D, N)
    dout, dfinal = torch.randn(1, L, D), torch.randn(len(lengths), D, N)
    with config.patch(kernels=kernels):
        packed = scan_and_grads(
            inputs, offsets(lengths, torch.int64 if wide else torch.int32), state, dout=dout, dfinal=dfinal
        )
        alone = each_alone(inputs, lengths, state, dout, dfinal)
    assert_all_close(packed, alone)
    if kernels == "auto":
        exact = ("out", "du", "ddelta", "dz", "final_state", "dinitial_state")
        assert_all_close({name: packed[name] for name in exact}, alone, BITWISE)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(first=st.sampled_from([0, 1, 3, 63, 64, 65, 100]), second=st.sampled_from([0, 1, 62, 64, 66]))
def test_a_document_cut_anywhere_goes_on_from_its_state(first, second):
    L = first + second
    inputs, state = make_inputs(L=L), torch.randn(1, 12, 5)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    whole = selective_scan(**leaves, delta_softplus=True, initial_state=state, output_final_state=True)
    head, carried = selective_scan(
        **tokens(leaves, slice(0, first)), delta_softplus=True, initial_state=state, output_final_state=True
    )
    tail, final = selective_scan(
        **tokens(leaves, slice(first, L)), delta_softplus=True, initial_state=carried, output_final_state=True
    )
    cut = torch.cat([head, tail], 1), final
    assert_all_close(dict(enumerate(cut)), dict(enumerate(whole)), BITWISE)
    weights = [torch.randn_like(x) for x in whole]
    expected = torch.autograd.grad(whole, list(leaves.values()), weights)
    results = torch.autograd.grad(cut, list(leaves.values()), weights)
    assert_all_close(dict(zip(leaves, results, strict=True)), dict(zip(leaves, expected, strict=True)))


def test_many_documents_agree_with_the_fp64_reference():
    lengths = [0, 3, 64, 1, 0, 130, 61, 800, 2, 40, 0]
    inputs, state = make_inputs(L=sum(lengths), D=10, N=3), torch.randn(len(lengths), 10, 3)
    exact = scan_and_grads(as_double(inputs), offsets(lengths), state.double())
    assert_all_close(scan_and_grads(inputs, offsets(lengths), state), exact)


def test_all_documents_of_one_token():
    inputs = make_inputs(L=150)
    documents = torch.arange(151)
    assert_all_close(scan_and_grads(inputs, documents), scan_and_grads(as_double(inputs), documents))


def test_rows_of_a_batch_are_documents():
    inputs = make_inputs(B=3, L=70)
    packed = {name: x.reshape(1, 210, *x.shape[2:]) if x.ndim == 3 else x for name, x in inputs.items()}
    rows, row = scan_and_grads(inputs), scan_and_grads(packed, offsets([70, 70, 70]), dout=None)
    for name in ("out", "final_state"):
        assert torch.equal(rows[name].flatten(), row[name].flatten()), name


def test_permuting_documents_permutes_the_results():
    lengths, order = [5, 64, 1, 70, 30], [3, 0, 4, 1, 2]
    inputs = make_inputs(L=sum(lengths))
    index = torch.cat([torch.arange(*span.indices(170)) for span in [spans(lengths)[n] for n in order]])
    moved = {name: x[:, index] if x.ndim == 3 else x for name, x in inputs.items()}
    dout, dfinal = torch.randn(1, 170, 12), torch.randn(5, 12, 5)
    results = scan_and_grads(inputs, offsets(lengths), dout=dout, dfinal=dfinal)
    permuted = scan_and_grads(moved, offsets([lengths[n] for n in order]), dout=dout[:, index], dfinal=dfinal[order])
    assert_all_close(
        {name: permuted[name] for name in PER_TOKEN},
        {name: x[:, index] for name, x in results.items() if name in PER_TOKEN},
        BITWISE,
    )
    assert_all_close({"final": permuted["final_state"]}, {"final": results["final_state"][order]}, BITWISE)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 7.0])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z", "initial_state"])
def test_nothing_in_one_document_changes_another_by_one_bit(kernels, name, poison):
    lengths = [10, 61, 2, 0, 30]
    inputs, state = make_inputs(L=103), torch.randn(5, 12, 5)
    bad, bad_state = {key: x.clone() for key, x in inputs.items()}, state.clone()
    if name == "initial_state":
        bad_state[1] = poison
    else:
        bad[name][:, 10:71] = poison
    with config.patch(kernels=kernels):
        clean = scan_and_grads(inputs, offsets(lengths), state)
        results = scan_and_grads(bad, offsets(lengths), bad_state)
    others = [*range(10), *range(71, 103)]
    for key in PER_TOKEN:
        assert torch.equal(results[key][:, others], clean[key][:, others]), key
    for key in ("final_state", "dinitial_state"):
        assert torch.equal(results[key][[0, 2, 3, 4]], clean[key][[0, 2, 3, 4]]), key
    assert not torch.equal(results["out"], clean["out"])


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_no_tokens_at_all(kernels):
    inputs, state = make_inputs(L=0), torch.randn(2, 12, 5)
    with config.patch(kernels=kernels):
        results = scan_and_grads(inputs, offsets([0, 0]), state)
        assert selective_scan(**make_inputs(B=0)).shape == (0, 20, 12)
    assert results["out"].shape == (1, 0, 12)
    assert torch.equal(results["final_state"], state)
    assert not results["dA"].any()
