"""Rows that hold several documents: every model gives what it gives of each document alone."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import TWO_ROWS, WAYS, Mixed, alone, by, compiled, mix, offsets, pieces, positions, tokens
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import packc

OTHERS = [[2, 2, 2, 3], [1, 8]]


def assert_alone(model, fast, rows, **way):
    ids = tokens(rows)
    with packc.documents(**way):
        torch.testing.assert_close(fast(ids), alone(model, ids, rows), rtol=1e-5, atol=1e-5)


@st.composite
def some_rows(draw):
    length = draw(st.integers(2, 10))

    def row():
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4)))
        return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]

    return [row() for _ in range(draw(st.integers(1, 3)))]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=some_rows(), way=st.sampled_from(WAYS), seed=st.integers(0, 3))
def test_documents_in_a_row_are_as_they_are_alone(rows, way, seed):
    torch.manual_seed(seed)
    model, ids = Mixed(), tokens(rows)
    fast = torch.compile(model, backend=packc.backend, options={"packc.inner": "eager"}, dynamic=True)
    weights = torch.randn(*ids.shape, 32)
    with packc.documents(**by(way, rows)):
        out = fast(ids)
    want = alone(model, ids, rows)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    got, expected = (torch.autograd.grad((x * weights).sum(), model.parameters()) for x in (out, want))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_documents_enter_graphs_that_were_compiled_without_them():
    model = Mixed()
    fast = compiled(model)
    ids = tokens(TWO_ROWS)
    torch.testing.assert_close(fast(ids), model(ids))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_alone(model, fast, TWO_ROWS, **by("cu_seqlens", TWO_ROWS))
        assert_alone(model, fast, OTHERS, **by("seq_idx", OTHERS))
        torch.testing.assert_close(fast(ids), model(ids))


def test_documents_enter_graphs_with_a_padding_mask_without_a_compilation():
    model = Mixed()
    fast = compiled(model, **{"packc.strict": True})
    for step, rows in enumerate(([[9], [9]], TWO_ROWS, OTHERS)):
        ids = tokens(rows)
        mask = torch.ones_like(ids)
        with torch._dynamo.config.patch(error_on_recompile=step > 0), packc.documents(**by("cu_seqlens", rows)):
            torch.testing.assert_close(fast(ids, mask), alone(model, ids, rows), rtol=1e-5, atol=1e-5)


def test_padding_in_rows_of_documents_is_left_out():
    model = Mixed()
    ids, mask = tokens(TWO_ROWS), torch.tensor([[1] * 8 + [0], [1] * 5 + [0] * 4])
    rows = [[3, 5], [4, 1]]
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 1, 1, 1, 1, 1]])
    fast = compiled(model, **{"packc.strict": True})
    with packc.documents(seq_idx=seq_idx):
        out = fast(ids, mask)
    for row, start, end in pieces(rows):
        torch.testing.assert_close(out[row : row + 1, start:end], model(ids[row : row + 1, start:end]))
    assert out[0, 8:].eq(0).all()
    assert out[1, 5:].eq(0).all()


def test_padding_between_documents_keeps_none_of_them_together():
    """A row with padding inside runs whole, and its documents are told apart all the same."""
    taps = torch.randn(4, 3)

    def model(x, mask):
        return packc.ops.causal_conv1d(x * mask[..., None], taps)

    x, mask = torch.randn(1, 8, 4), torch.tensor([[1, 1, 1, 0, 1, 1, 1, 0]])
    fast = compiled(model)
    # That pads to a multiple: at padding positions say nothing.
    position_ids = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 0]])
    with packc.documents(position_ids=position_ids), pytest.warns(UserWarning, match="padding between tokens"):
        out = fast(x, mask)
    for start, end in ((0, 3), (4, 7)):
        torch.testing.assert_close(out[:, start:end], packc.ops.causal_conv1d(x[:, start:end], taps))


def test_no_boundaries_are_no_change():
    model = Mixed()
    fast = compiled(model)
    for rows in ([[9], [9]], [[4]]):
        ids = tokens(rows)
        with packc.documents(**by("cu_seqlens", rows)):
            torch.testing.assert_close(fast(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_positions_of_the_caller_are_taken_as_they_are():
    table, taps = torch.randn(64, 4), torch.randn(4, 3)

    def model(x, place):
        return packc.ops.causal_conv1d(x + table[place], taps)

    x, place = torch.randn(1, 9, 4), torch.arange(9)[None] + 7
    fast = compiled(model)
    with packc.documents(cu_seqlens=offsets([4, 5])):
        out = fast(x, place)
    torch.testing.assert_close(out, torch.cat([model(x[:, :4], place[:, :4]), model(x[:, 4:], place[:, 4:])], 1))


def test_one_row_of_positions_for_all_is_no_table():
    taps = torch.randn(4, 3)

    def model(x, place):
        return packc.ops.causal_conv1d(x * place[..., None], taps)

    x, place = torch.randn(2, 9, 4), torch.randn(1, 9)
    fast = compiled(model)
    with packc.documents(**by("cu_seqlens", TWO_ROWS)):
        out = fast(x, place)
    for row, start, end in pieces(TWO_ROWS):
        want = model(x[row : row + 1, start:end], place[:, start:end])
        torch.testing.assert_close(out[row : row + 1, start:end], want)


def by_positions(x, position_ids):
    """Attention whose mask hides other documents, as transformers makes one of positions."""
    number = F.pad((position_ids.diff(dim=-1) != 1).cumsum(-1), (1, 0))
    before = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    visible = (number[:, None, :, None] == number[:, None, None, :]) & before
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], visible)[:, 0]


def test_a_mask_made_of_positions_is_what_they_say():
    x, rows = torch.randn(2, 9, 4), [positions([[9], [9]]), positions(TWO_ROWS), positions(OTHERS)]
    fast = compiled(by_positions)
    for step, position_ids in enumerate(rows):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            torch.testing.assert_close(fast(x, position_ids), by_positions(x, position_ids))
    report = packc.explain(by_positions)(x, rows[1])
    assert [mixer.packed for mixer in report.mixers] == [True]


def test_positions_that_leave_some_out_are_left_to_the_mask():
    """To which they begin another document, though they do not start again."""
    x, gap = torch.randn(1, 9, 4), torch.tensor([[0, 1, 2, 5, 6, 0, 1, 3, 4]])
    fast = compiled(by_positions)
    torch.testing.assert_close(fast(x, positions([[5, 4]])), by_positions(x, positions([[5, 4]])))
    torch.testing.assert_close(fast(x, gap), by_positions(x, gap))
    mixed = compiled(lambda x, position_ids: mix(by_positions(x, position_ids)))
    out = mixed(x, gap)
    attended = by_positions(x, gap)
    torch.testing.assert_close(out, torch.cat([mix(attended[:, :5]), mix(attended[:, 5:])], 1))
    with packc.documents(cu_seqlens=offsets([2, 7])), pytest.raises(ValueError, match="disagree"):
        mixed(x, gap)
    rising = torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9, 10]])
    with packc.documents(cu_seqlens=offsets([2, 7])), pytest.raises(packc.NotPacked, match="scaled_dot_product"):
        mixed(x, rising)


def test_heads_may_give_entries_of_one_token_each():
    model, ids = Mixed(), tokens(TWO_ROWS)

    def log_probs(ids):
        return model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])

    def last(ids):
        return model(ids)[:, -1]

    want = alone(model, ids, TWO_ROWS)
    with packc.documents(**by("seq_idx", TWO_ROWS)):
        got = compiled(log_probs)(ids), compiled(last)(ids)
    torch.testing.assert_close(got[0], want[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]))
    torch.testing.assert_close(got[1], want[:, -1])


def test_what_the_graph_recomputes_knows_documents():
    model = Mixed()
    rows = TWO_ROWS
    ids, weights = tokens(rows), torch.randn(2, 9, 32)

    def step(ids):
        return checkpoint(model, ids, use_reentrant=False) * weights

    fast = compiled(step)
    with packc.documents(**by("cu_seqlens", rows)):
        out = fast(ids)
    got = torch.autograd.grad(out.sum(), model.parameters())
    torch.testing.assert_close(got, torch.autograd.grad((alone(model, ids, rows) * weights).sum(), model.parameters()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_graph_that_is_recomputed_outside_of_the_block_raises(reentrant):
    model = Mixed()
    fast = compiled(lambda x, ids: model(ids) + x)
    ids, x = tokens(TWO_ROWS), torch.zeros(2, 9, 32, requires_grad=True)
    with packc.documents(**by("cu_seqlens", TWO_ROWS)):
        fast(x, ids)
        out = checkpoint(fast, x, ids, use_reentrant=reentrant)
        out.sum().backward(retain_graph=True)  # in it, all is well
        out = checkpoint(fast, x, ids, use_reentrant=reentrant)
    with pytest.raises(packc.NotPacked, match="recomputed in a backward"):
        out.sum().backward()


def test_a_block_inside_of_a_compiled_function_is_heeded():
    model = Mixed()
    ids, cu_seqlens = tokens(TWO_ROWS), by("cu_seqlens", TWO_ROWS)["cu_seqlens"]

    def step(ids, cu_seqlens):
        with packc.documents(cu_seqlens=cu_seqlens):
            return model(ids)

    torch.testing.assert_close(compiled(step)(ids, cu_seqlens), alone(model, ids, TWO_ROWS), rtol=1e-5, atol=1e-5)


def test_a_block_that_nobody_heeds_warns():
    """As where Dynamo has compiled a model too often, and runs it as it is."""
    model, fast = Mixed(), compiled(Mixed())
    with pytest.warns(UserWarning, match="nothing that packc compiled"), packc.documents(**by("seq_idx", TWO_ROWS)):
        model(tokens(TWO_ROWS))
    with warnings.catch_warnings(), packc.documents(**by("seq_idx", TWO_ROWS)):
        warnings.simplefilter("error")
        fast(tokens(TWO_ROWS))
        with packc.documents(**by("seq_idx", TWO_ROWS)):
            fast(tokens(TWO_ROWS))
    torch._dynamo.reset()
    fast = compiled(model)
    with torch._dynamo.config.patch(recompile_limit=1), packc.documents(**by("seq_idx", TWO_ROWS)):
        fast(tokens(TWO_ROWS))
    limit, said = torch._dynamo.config.patch(recompile_limit=1), pytest.warns(UserWarning, match="recompile_limit")
    with limit, said, torch.no_grad(), packc.documents(**by("seq_idx", TWO_ROWS)):
        fast(tokens(TWO_ROWS))


def test_explain_says_what_is_packed():
    with packc.documents(**by("cu_seqlens", TWO_ROWS)):
        report = packc.explain(Mixed())(tokens(TWO_ROWS))
    assert (report.tokens, report.fallback, report.boundaries) == (18, None, [])
    assert [mixer.packed for mixer in report.mixers] == [True] * 3


def test_losses_of_picked_entries():
    model, ids, labels = Mixed(), tokens(TWO_ROWS), torch.tensor([[1, 2], [3, 4]])
    places = torch.tensor([[0, 7], [3, 8]])

    def loss(ids, labels):
        logits = model(ids)
        picked = logits[torch.arange(2)[:, None], places]
        return F.cross_entropy(picked.flatten(0, 1), labels.flatten()) + F.cross_entropy(logits[:, -1], labels[:, 0])

    want = alone(model, ids, TWO_ROWS)
    with packc.documents(**by("seq_idx", TWO_ROWS)):
        got = compiled(loss)(ids, labels)
    picked = want[torch.arange(2)[:, None], places]
    torch.testing.assert_close(
        got, F.cross_entropy(picked.flatten(0, 1), labels.flatten()) + F.cross_entropy(want[:, -1], labels[:, 0])
    )


def test_labels_of_the_tokens_themselves_are_nobody_elses():
    def model(x, labels):
        return F.cross_entropy(mix(x).flatten(0, 1), labels.flatten())

    x, labels = torch.randn(1, 9, 4), torch.randint(0, 4, (1, 9))
    with packc.documents(cu_seqlens=offsets([4, 5])):
        loss = compiled(model)(x, labels)
    want = F.cross_entropy(torch.cat([mix(x[:, :4]), mix(x[:, 4:])], 1)[0], labels[0])
    torch.testing.assert_close(loss, want)
