"""A function of rows is one node of what is packed, whatever is inside; what is not one is refused."""

import pytest
import torch
from harness import RIGHT, RecordingBackend, masks

import packc
from packc.ops.row_wise import begin_row_wise, end_row_wise

H = 4
W = torch.randn(H, H, generator=torch.Generator().manual_seed(1))
TAPS = torch.randn(H, 2, generator=torch.Generator().manual_seed(2))
MASK = masks(RIGHT)


def sorted_and_back(rows):
    """Row by row, although no op of it is."""
    order = rows[:, 0].argsort()
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return (rows[order] @ W).view(rows.shape[0], 2, 2).flatten(1)[back]


def marked(function, x, *others):
    return end_row_wise(function(*begin_row_wise([x, *others])), x)


def on_tokens(function):
    """What a model computes of ``x`` (B, L, H) and its mask: the function between a mixer and the result."""

    def model(x, mask):
        tokens = packc.ops.causal_conv1d(x * mask[..., None], TAPS).flatten(0, 1)
        return function(tokens, mask).view(x.shape)

    return model


def run(function):
    x, backend = torch.randn(*MASK.shape, H), RecordingBackend("eager")
    model = on_tokens(function)
    actual = torch.compile(model, backend=backend, fullgraph=True)(x, MASK)
    with torch.no_grad():
        return backend, actual, model(x, MASK)


def test_its_rows_are_tokens():
    backend, actual, expected = run(lambda tokens, mask: marked(sorted_and_back, tokens))
    assert not backend.reasons
    assert backend.op_count(torch.ops.packc.unpack.default) == 1
    torch.testing.assert_close(actual[MASK.bool()], expected[MASK.bool()], rtol=1e-5, atol=1e-5)


def written_in_place(rows):
    sums = (rows @ W).unsqueeze(-1).squeeze(-1)
    sums.add_(W[0])
    return sums


@pytest.mark.parametrize("function", [written_in_place, lambda rows: rows, lambda rows: rows * 2])
def test_anything_row_by_row_may_be_inside(function):
    backend, actual, expected = run(lambda tokens, mask: marked(function, tokens))
    assert not backend.reasons
    torch.testing.assert_close(actual[MASK.bool()], expected[MASK.bool()], rtol=1e-5, atol=1e-5)


def with_other_rows(tokens, mask):
    return marked(lambda a, b: a + b, tokens.view(*mask.shape, H), mask[..., None]).flatten(0, 1)


def without_gradients(rows):
    with torch.no_grad():
        return rows @ W


def read_outside(tokens, mask):
    (rows,) = begin_row_wise([tokens])
    sums = rows @ W
    return end_row_wise(sums * 2, tokens) + sums.sum()


def not_closed(tokens, mask):
    return tokens + begin_row_wise([tokens])[0].sum()


def writes_to_its_rows(rows):
    rows.add_(1)
    return rows * 2


REFUSED = {
    "rows of the batch": (with_other_rows, "which are not tokens"),
    "other tokens inside": (
        lambda tokens, mask: marked(lambda rows: rows + tokens.view(*mask.shape, H).sum(), tokens),
        "not masked",
    ),
    "tokens that are no rows": (
        lambda tokens, mask: marked(lambda rows: rows + tokens[: rows.shape[0]], tokens),
        "varies from token to token",
    ),
    "grad mode": (lambda tokens, mask: marked(without_gradients, tokens), "grad mode"),
    "read outside": (read_outside, "reads what is inside"),
    "not closed": (not_closed, "begins or ends beyond"),
    "writes to its rows": (lambda tokens, mask: marked(writes_to_its_rows, tokens), "writes in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runs_unpacked_with_the_reason(name):
    function, reason = REFUSED[name]
    backend, actual, expected = run(function)
    assert reason in backend.reasons[0], backend.reasons
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_random_rows_are_drawn_once():
    def read_padded_and_packed(tokens, mask):
        drawn = marked(lambda rows: torch.rand_like(rows), mask.flatten()[:, None].expand(-1, H).float())
        return tokens * drawn + drawn.view(*mask.shape, H).cumsum(1).flatten(0, 1)

    backend = RecordingBackend("eager")
    torch.compile(on_tokens(read_padded_and_packed), backend=backend, fullgraph=True)(torch.randn(*MASK.shape, H), MASK)
    assert "draws random numbers" in backend.reasons[0]
