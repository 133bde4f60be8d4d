"""``model.generate`` of left-padded prompts: the prefill packs, and tokens and caches are stock's."""

import functools
import sys
import warnings
from pathlib import Path

import pytest
import torch
from harness import EMPTY_ROW, HOLE, RIGHT, RecordingBackend, masks
from torch import nn

import packc
from packc.boundaries import Given, say_something

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from families import build

SHORT, LONG = ["000111", "111111", "000001"], ["0001111111", "0111111111", "0000000001", "1111111111"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "use_cache": True}
FAMILIES_TRIED = (
    "mamba",
    "bamba",
    "mamba2",
    "falcon_mamba",
    "falcon_h1",
    "qwen3_next",
    "llama",
    "lfm2",
    "zaya",
    "nemotron_h",
    "gemma3",
    "gemma2",
    "gpt_oss",
)


def shaken(family):
    torch.manual_seed(0)
    model = build(family, 32, 2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def prompts(rows):
    mask = masks(rows)
    return {"input_ids": torch.randint(1, 512, mask.shape), "attention_mask": mask}


def cached(generated, mask):
    """States by layer; keys and values where they are a token's."""
    found = {}
    for number, layer in enumerate(generated.cache.layers):
        for name in ("conv_states", "recurrent_states"):
            for state, value in getattr(layer, name, {}).items():
                if value is not None:
                    found[number, name, state] = value
        for name in ("keys", "values"):
            value = getattr(layer, name, None)
            if value is not None:
                seen = nn.functional.pad(mask, (0, GREEDY["max_new_tokens"] - 1), value=1)[:, -value.shape[2] :]
                found[number, name] = value * seen[:, None, :, None]
    return found


def assert_generates_as_stock(model, compiled_from, rows):
    batch = prompts(rows)
    wanted, got = compiled_from.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY)
    assert got.sequences.equal(wanted.sequences)
    expected, actual = cached(wanted, batch["attention_mask"]), cached(got, batch["attention_mask"])
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5 * value.abs().max().item())


@pytest.mark.slow  # examples/generate.py compares the tokens of one
@pytest.mark.parametrize("family", FAMILIES_TRIED)
def test_tokens_and_caches_are_those_of_stock(family):
    model, stock = shaken(family), shaken(family)
    model.compile(backend="packc", options={"packc.inner": "aot_eager", "packc.strict": True})
    for number, rows in enumerate([SHORT, LONG, [row[2:] for row in LONG]]):
        before = packc.stats()
        with torch._dynamo.config.patch(error_on_recompile=number > 1), warnings.catch_warnings():
            warnings.filterwarnings("error", message="packc")
            assert_generates_as_stock(model, stock, rows)
        after = packc.stats()
        real = int(masks(rows).sum())
        assert [after[name] - before[name] for name in ("steps", "tokens")] == [1, real]


def test_rows_that_end_in_padding_are_generated_from_as_by_stock():
    model, stock = shaken("llama"), shaken("llama")
    model.compile(backend="packc", options={"packc.inner": "aot_eager"})
    for rows in (RIGHT, EMPTY_ROW, HOLE):
        batch = prompts(rows)
        with torch.no_grad():
            got, wanted = (each(**batch, logits_to_keep=1, use_cache=True).logits for each in (model, stock))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


class Convolved(nn.Module):
    """A convolution that hands on its last inputs, ``(B, D, W - 1)``, as a cache keeps them."""

    def __init__(self, *, bias):
        super().__init__()
        self.tokens, self.into = nn.Embedding(32, 4), nn.Linear(4, 4, bias=bias)
        self.taps = nn.Parameter(torch.randn(4, 4))

    def forward(self, ids, attention_mask):
        # A mixer first: what has met none is there padded anyway.
        first = packc.ops.causal_conv1d(self.tokens(ids) * attention_mask[..., None], self.taps)
        x = self.into(first * attention_mask[..., None]).transpose(1, 2)
        state = torch.zeros(len(ids), 4, 3).copy_(x[..., -3:])
        return packc.ops.causal_conv1d(x.transpose(1, 2), self.taps), state


@pytest.mark.parametrize("bias", [False, True])
def test_last_inputs_of_a_convolution_are_those_of_stock(bias):
    model, backend = Convolved(bias=bias), RecordingBackend()
    compiled = torch.compile(model, backend=backend)
    for rows in (SHORT, RIGHT, HOLE, EMPTY_ROW):
        batch = torch.randint(1, 32, masks(rows).shape), masks(rows)
        (out, state), (wanted, wanted_state) = compiled(*batch), model(*batch)
        torch.testing.assert_close(state, wanted_state)
        real = batch[1].bool()
        torch.testing.assert_close(out[real], wanted[real])
    assert backend.reasons == []
    assert backend.op_count(torch.ops.packc.row_ends.default) == 1
    assert backend.op_count(torch.ops.packc.unpack.default) == 1  # of the result alone


def test_positions_of_padding_begin_no_documents_in_a_graph_that_is_not_packed():
    positions = Given("position_ids", torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]))
    padded, later = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    seen = padded[:, None, None, :].bool() & torch.ones(4, 6).tril()[:, :4].bool()
    added = torch.zeros(2, 1, 4, 4).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert say_something([positions])
    for mask in (padded, later, seen, added):
        assert not say_something([positions], mask)
    packed = Given("position_ids", torch.tensor([[0, 0, 1, 0], [0, 1, 2, 3]]))
    for mask in (padded.bool(), later, seen):
        assert say_something([packed], mask)


class Unpackable(nn.Module):
    """Of a mixer, in a graph that is not packed."""

    def forward(self, input_ids, attention_mask, position_ids, cache):
        cache.add_(1)
        x = input_ids[..., None].float() + position_ids[..., None] + attention_mask.float().mean()
        return packc.ops.linear_scan(torch.full_like(x, 0.5), x)


def test_a_later_part_of_a_prompt_runs_as_it_is():
    model = Unpackable()
    compiled = torch.compile(model, backend="packc", options={"packc.inner": "aot_eager"})
    ids, positions = torch.randint(1, 9, (2, 4)), torch.tensor([[0, 0, 0, 1], [3, 4, 5, 6]])
    mask = masks(["00000011", "11111111"])
    torch.testing.assert_close(
        compiled(ids, mask, positions, torch.zeros(2)), model(ids, mask, positions, torch.zeros(2))
    )
    with pytest.raises(packc.NotPacked, match="position_ids"):
        compiled(ids, mask, torch.tensor([[0, 0, 0, 1], [3, 4, 0, 1]]), torch.zeros(2))


def in_two_turns(model, batch):
    first = model.generate(**batch, **GREEDY)
    ids = torch.cat([first.sequences, torch.arange(5, 9).expand(len(first.sequences), 4)], 1)
    new = ids.shape[1] - batch["attention_mask"].shape[1]
    mask = nn.functional.pad(batch["attention_mask"], (0, new), value=1)
    return model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)


def with_options(model, batch, **options):
    return model.generate(**batch, **GREEDY, **options)


FROM_A_CACHE = {
    "static": functools.partial(with_options, cache_implementation="static"),
    "in parts": functools.partial(with_options, prefill_chunk_size=4),
    "in two turns": in_two_turns,
}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=[] if (family, name) == ("llama", "in two turns") else pytest.mark.slow)
        for family in ("llama", "bamba")
        for name in FROM_A_CACHE
    ],
)
def test_what_goes_on_from_a_cache_says_so_and_generates_stocks_tokens(family, name):
    model, stock = shaken(family), shaken(family)
    model.compile(backend="packc", options={"packc.inner": "aot_eager"})
    batch, before = prompts(LONG), packc.stats()["graphs"]["unpacked"]
    got, wanted = FROM_A_CACHE[name](model, batch).sequences, FROM_A_CACHE[name](stock, batch).sequences
    assert got.equal(wanted)
    after = packc.stats()["graphs"]["unpacked"]
    prompts_left = [
        reason for reason in after if after[reason] > before.get(reason, 0) and not reason.startswith("one token a row")
    ]
    assert prompts_left
    assert all(reason.startswith("goes on from a cache") for reason in prompts_left)
