"""Where documents in a row would be mixed, or might be, the call raises and says what mixes them."""

import pytest
import torch
from harness import tiny_mamba
from rows import TWO_ROWS, Mixed, by, compiled, mix, offsets, positions, tokens
from torch.nn import functional as F

import packc


def refused(model, *inputs, match):
    for first in (True, False):  # compiled with documents, and without
        torch._dynamo.reset()
        fast = compiled(model)
        if not first:
            fast(*inputs)
        with packc.documents(**by("cu_seqlens", TWO_ROWS)), pytest.raises(packc.NotPacked, match=match):
            fast(*inputs)


def values():
    return torch.randn(2, 9, 4)


def test_an_op_without_a_rule_that_looks_along_the_rows():
    refused(lambda x: mix(x.cumsum(1)), values(), match="cumsum")
    refused(lambda x: mix(x).cumsum(1), values(), match="cumsum")
    refused(lambda x: mix(x + F.pad(x, (0, 0, 0, 1))[:, 1:]), values(), match="along the rows")
    refused(lambda x: mix(x).mean(1), values(), match="mean")
    refused(lambda x: mix(x) - mix(x).mean(), values(), match="sum over the tokens")


def test_an_entry_of_another_token():
    refused(lambda x: mix(x) + mix(x)[:, :1], values(), match="an entry of another place")
    refused(lambda x: mix(x) * mix(x)[:, -1].sigmoid()[:, None], values(), match="an entry of another place")
    refused(lambda x: torch.cat([mix(x)[:, 0], mix(x)[:, -1]], 1), values(), match="several along the rows")
    places = torch.tensor([[0, 7], [3, 8]])
    refused(lambda x: mix(x)[torch.arange(2)[:, None], places].mean(1), values(), match="several along the rows")
    refused(lambda x: mix(x)[0].mean(0), values(), match="several along the rows")

    def loop(x):
        h, state, states = mix(x), torch.zeros(2, 4), []
        for t in range(x.shape[1]):
            state = state / 2 + h[:, t]
            states.append(state)
        return torch.stack(states, 1)

    refused(loop, values(), match="several along the rows")


def test_sums_of_entries_of_one_token_each():
    model, ids, weights = Mixed(), tokens(TWO_ROWS), torch.ones(2, 8, 1, dtype=torch.int64)

    def log_probs(ids):
        return model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])

    refused(lambda ids: log_probs(ids).sum(1), ids, match="sum")
    refused(lambda ids, weights: (log_probs(ids) * weights).sum(1), ids, weights, match="several along the rows")


COUNTED = {
    "from the end": lambda x: torch.arange(x.shape[1]).flip(0),
    "the end of a table": lambda x: torch.arange(20.0)[-x.shape[1] :],
    "from before the first": lambda x: torch.arange(1 - x.shape[1], 1),
    "around": lambda x: torch.arange(x.shape[1]).roll(1),
    "as parts": lambda x: torch.linspace(0, 1, x.shape[1]),
    "as shares": lambda x: torch.arange(x.shape[1]).float().softmax(0),
    "to all others": lambda x: (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs().sum(1),
}


@pytest.mark.parametrize("name", COUNTED)
def test_positions_that_hang_on_the_length_of_a_row(name):
    with packc.documents(**by("cu_seqlens", TWO_ROWS)), pytest.raises(packc.NotPacked, match="as many positions"):
        compiled(lambda x: mix(x * COUNTED[name](x)[:, None]))(values())


def test_an_op_without_a_rule_beside_a_mask():
    mask = torch.ones(2, 9, dtype=torch.int64)
    mixed = lambda x, attention_mask: mix(x * attention_mask[..., None])  # noqa: E731
    refused(lambda x, attention_mask: mixed(x, attention_mask) + x.cumsum(1), values(), mask, match="along the rows")
    place = lambda attention_mask: attention_mask.cumsum(1)[..., None] - 1  # noqa: E731
    refused(
        lambda x, attention_mask: mixed(x, attention_mask) * place(attention_mask),
        values(),
        mask,
        match="along the rows",
    )


def test_states_of_rows():
    taps = torch.ones(4, 3)
    state = torch.zeros(2, 4, 2)
    refused(
        lambda x: packc.ops.causal_conv1d(x, taps, output_final_state=True),
        values(),
        match="returns the state of each row",
    )
    refused(
        lambda x, state: packc.ops.causal_conv1d(x, taps, initial_state=state), values(), state, match="initial state"
    )


def test_attention_that_runs_padded():
    refused(Mixed(slope=0.1), tokens(TWO_ROWS), match="scaled_dot_product_attention")


def test_a_label_of_another_documents_token():
    model = tiny_mamba(layers=1)
    ids = tokens([[4, 5]])
    labels = ids.clone()
    labels[0, 4] = -100
    fast = compiled(model)
    with packc.documents(cu_seqlens=offsets([4, 5])):
        with pytest.raises(packc.NotPacked, match="every document's first token"):
            fast(input_ids=ids, labels=ids)
        loss = fast(input_ids=ids, labels=labels).loss
    losses = [model(input_ids=part, labels=part).loss * (part.shape[1] - 1) for part in (ids[:, :4], ids[:, 4:])]
    torch.testing.assert_close(loss, sum(losses) / 7)


def test_what_is_handed_over_wrongly():
    ids = tokens(TWO_ROWS)
    fast = compiled(Mixed())
    for way, message in (
        ({"cu_seqlens": offsets([3, 5, 1])}, "do not rise from 0 to 18"),
        ({"cu_seqlens": torch.tensor([0, 9, 3, 18])}, "do not rise"),
        ({"cu_seqlens": torch.tensor([[0, 18, 18]])}, "must be"),
        (
            {"seq_idx": torch.zeros(1, 5, dtype=torch.int64).diff(prepend=torch.ones(1, 1, dtype=torch.int64))},
            "does not fit",
        ),
        ({"position_ids": positions([[3, 4]])}, "does not fit"),
    ):
        with packc.documents(**way), pytest.raises(ValueError, match=message):
            fast(ids)
    for way in ({}, {"seq_idx": ids, "cu_seqlens": ids}, {"seq_idx": ids.float()}, {"cu_seqlens": [0, 9, 18]}):
        with pytest.raises(TypeError, match="packc.documents"), packc.documents(**way):
            pass
