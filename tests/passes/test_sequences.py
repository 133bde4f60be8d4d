"""An input belongs to a mask's sequence when their values meet, never because of its size."""

import random

import pytest
import torch
from harness import RIGHT, RecordingBackend, masks
from torch import nn
from torch.nn import functional as F

import packc

H = 4
TAPS = torch.randn(H, 3, generator=torch.Generator().manual_seed(1))
OTHER = ["11000000", "11111111", "11111100"]
DEBUG = {"packc.inner": "aot_eager"}


def mix(x):
    return packc.ops.causal_conv1d(x, TAPS, activation="silu")


def values(rows=3, length=8):
    return torch.randn(rows, length, H)


def run(function, *inputs, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="packc", options={**DEBUG, **options})(*inputs)


def assert_right(function, inputs, real, **options):
    for got, want, mask in zip(run(function, *inputs, **options), function(*inputs), real, strict=True):
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()])


def two(x, attention_mask, y, ref_mask):
    return mix(x * attention_mask[..., None]), mix(y * ref_mask[..., None])


def test_two_sequences_of_one_size_keep_their_own_tokens():
    inputs = values(), masks(RIGHT), values(), masks(OTHER)
    assert_right(two, inputs, (inputs[1], inputs[3]))
    assert_right(two, inputs, (inputs[1], inputs[3]), **{"packc.mask": "ref_mask"})
    report = packc.explain(two)(*inputs)
    assert [mixer.packed for mixer in report.mixers] == [True, False]
    assert "never meet attention_mask" in report.fallback
    with pytest.raises(Exception, match="cannot pack all of this graph"):
        run(two, *inputs, **{"packc.strict": True})


def test_one_masked_and_one_not():
    def function(x, attention_mask, y):
        return mix(x * attention_mask[..., None]), mix(y)

    x, mask, y = values(), masks(RIGHT), values()
    assert_right(function, (x, mask, y), (mask, torch.ones(3, 8)))


@pytest.mark.parametrize("mixed", [False, True])
def test_queries_are_no_tokens_of_the_keys_that_they_are_as_many_as(mixed):
    def function(x, attention_mask, y):
        q, k = (each.unflatten(2, (2, 2)).transpose(1, 2) for each in (mix(x) if mixed else x, y))
        seen = (attention_mask != 0)[:, None, None]
        return (F.scaled_dot_product_attention(q, k, k.cos(), attn_mask=seen).transpose(1, 2),)

    assert_right(function, (values(), masks(RIGHT), values()), (torch.ones(3, 8),))


class Dicts(nn.Module):
    def forward(self, chosen, rejected):
        return tuple(mix(each["x"] * each["attention_mask"][..., None]) for each in (chosen, rejected))


def test_masks_of_one_name_are_told_apart_by_their_path():
    model = Dicts()
    chosen = {"x": values(), "attention_mask": masks(RIGHT)}
    rejected = {"x": values(), "attention_mask": masks(OTHER)}
    real = chosen["attention_mask"], rejected["attention_mask"]
    for name, packed in ((None, (0, 1)), ("chosen.attention_mask", (0,)), ("rejected.attention_mask", (1,))):
        assert_right(model, (chosen, rejected), real, **({"packc.mask": name} if name else {}))
        with packc.config.patch(mask=name):
            torch._dynamo.reset()
            report = packc.explain(model)(chosen, rejected)
        assert report.tokens == sum(real[number].sum() for number in packed)
    with pytest.raises(Exception, match=r"may be any of \['chosen.attention_mask', 'rejected.attention_mask'\]"):
        run(model, chosen, rejected, **{"packc.mask": "attention_mask"})


def test_sequences_that_meet_after_mixing_are_not_packed():
    def function(x, attention_mask, y, ref_mask):
        a, b = two(x, attention_mask, y, ref_mask)
        return a, b, a - b

    inputs = values(), masks(RIGHT), values(), masks(OTHER)
    assert_right(function, inputs, (inputs[1], inputs[3], inputs[1] * inputs[3]))
    report = packc.explain(function)(*inputs)
    assert report.tokens is None
    assert "two sequences meet, attention_mask/x and ref_mask/y" in report.fallback


def test_two_masks_on_one_input_lose_nobodys_tokens():
    def function(x, attention_mask, ref_mask):
        return mix(x * attention_mask[..., None]), mix(x * ref_mask[..., None])

    x, mask, other = values(), masks(RIGHT), masks(OTHER)
    with pytest.warns(UserWarning, match="ref_mask marks tokens where attention_mask has padding"):
        assert_right(function, (x, mask, other), (mask, other))
    inside = mask * other
    torch._dynamo.reset()
    report = packc.explain(function)(x, mask, inside)
    assert (report.tokens, report.fallback) == (15, None)


def test_a_second_mask_of_another_form_loses_nobodys_tokens():
    def three_axes(x, attention_mask, other):
        return mix(x * attention_mask[..., None]), mix(x * other)

    def one_at_padding(x, attention_mask, other):
        return mix(x * attention_mask[..., None]), mix(x.masked_fill(other[..., None], 0.0))

    x, mask, other = values(), masks(RIGHT), masks(OTHER)
    assert_right(three_axes, (x, mask, other[..., None]), (mask, other))
    assert_right(one_at_padding, (x, mask, other == 0), (mask, other))


def test_a_second_mask_on_an_output_loses_nobodys_tokens():
    def function(x, attention_mask, other_mask):
        y = x * attention_mask[..., None]
        return mix(y), x * other_mask[..., None]

    x, mask, other = values(), masks(RIGHT), masks(OTHER)
    assert_right(function, (x, mask, other), (mask, other))


def test_a_second_mask_on_what_is_reduced_or_multiplied_loses_nobodys_tokens():
    def function(x, attention_mask, y, other_mask):
        z = y * other_mask[..., None]
        met = torch.cat([x * attention_mask[..., None], z], -1)
        return met, z.sum(-1), z.amax(-1), torch.einsum("bld,de->ble", z, torch.ones(H, 2)), z.cumsum(-1) ** 2

    x, mask, y, other = values(), masks(RIGHT), values(), masks(OTHER)
    with pytest.warns(UserWarning, match="other_mask marks tokens where attention_mask has padding"):
        assert_right(function, (x, mask, y, other), (mask, *[other] * 4))


def test_a_second_mask_loses_nobodys_tokens_whatever_is_made_of_what_it_hides():
    def function(x, attention_mask, y, other_mask):
        z = F.layer_norm(1 - y * other_mask[..., None], (H,))
        return mix(x * attention_mask[..., None]), z.exp() + x * attention_mask[..., None]

    x, mask, y, other = values(), masks(RIGHT), values(), masks(OTHER)
    with pytest.warns(UserWarning, match="other_mask marks tokens where attention_mask has padding"):
        assert_right(function, (x, mask, y, other), (mask, other))


def test_positions_are_no_mask():
    def function(x, attention_mask, positions):
        angles = positions[..., None] * torch.arange(1.0, H + 1)
        mixed = mix(x * attention_mask[..., None])
        return mixed * angles.cos() + mixed.flip(-1) * angles.sin()

    x, mask, positions = values(), masks(RIGHT), torch.arange(8).expand(3, 8)
    report = packc.explain(function)(x, mask, positions)
    assert (report.tokens, report.fallback) == (15, None)


def test_a_mask_that_fills_with_something_else_than_zero_is_still_the_mask():
    def function(x, attention_mask):
        return (mix(x.masked_fill(attention_mask[..., None] == 0, -1.0)),)

    x, mask = values(), masks(RIGHT)
    assert_right(function, (x, mask), (mask,))
    torch._dynamo.reset()
    assert packc.explain(function)(x, mask).tokens == 15


def test_a_mask_made_of_lengths_is_a_mask_of_its_own():
    def function(x, attention_mask, lengths):
        own = torch.arange(8)[None] < lengths[:, None]
        return mix(x * attention_mask[..., None]), mix(x * own[..., None])

    x, mask, lengths = values(), masks(RIGHT), torch.tensor([2, 8, 6])
    assert_right(function, (x, mask, lengths), (mask, masks(OTHER)))
    torch._dynamo.reset()
    assert "a mask of its own" in packc.explain(function)(x, mask, lengths).fallback


def test_encoder_and_decoder_of_one_length():
    def function(x, attention_mask, y):
        encoded = mix(x * attention_mask[..., None])
        scores = (y @ encoded.transpose(1, 2)).masked_fill(attention_mask[:, None] == 0, -torch.inf)
        return encoded, mix(y) + scores.softmax(-1) @ encoded

    x, mask, y = values(), masks(RIGHT), values()
    assert_right(function, (x, mask, y), (mask, torch.ones(3, 8)))


def test_labels_and_positions_of_a_sequence_are_its_own():
    """What meets is packed from the input on, not gathered where it meets."""

    def function(x, attention_mask, scale):
        return mix(F.silu(x) * attention_mask[..., None]) * scale.exp()

    backend = RecordingBackend("eager")
    torch.compile(function, backend=backend)(values(), masks(RIGHT), values())
    assert backend.op_count(torch.ops.packc.pack.default) == 3
    (silu,) = backend.after[-1].graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default)
    assert silu.args[0].target is torch.ops.packc.pack.default


# ---- random graphs ---------------------------------------------------------------------------------------------------

NAMES = ("attention_mask", "ref_mask", "mask")


class RandomGraph:
    """One to three inputs, some with a mask that is multiplied on somewhere, mixed, shifted, joined and returned."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        count = self.random.choice((1, 2, 2, 3, 3))
        lengths = [self.random.choice((H, 8, 8, 8, 8)) for _ in range(count)]
        self.masked = [self.random.random() < 0.75 for _ in range(count)]
        self.masked[0] = True
        names = self.random.sample(NAMES, count)
        self.inputs = {f"x{i}": torch.randn(3, length, H) for i, length in enumerate(lengths)}
        for i, length in enumerate(lengths):
            if self.masked[i]:
                starts = [self.random.choice((0, 0, self.random.randrange(length))) for _ in range(3)]
                ends = [self.random.randint(start, length) for start in starts]
                place = torch.arange(length)
                self.inputs[names[i]] = torch.stack(
                    [((place >= s) & (place < e)).long() for s, e in zip(starts, ends, strict=True)]
                )
        self.names = {i: names[i] for i in range(count) if self.masked[i]}
        self.steps = [self._step() for _ in range(self.random.randint(3, 9))]

    def _step(self) -> tuple[str, int, int]:
        kind = self.random.choice(("mask", "mask", "mix", "mix", "silu", "flip", "center", "add", "late mask"))
        return kind, self.random.randrange(100), self.random.randrange(100)

    def __call__(self, inputs):
        """Outputs, and for each the inputs it was made from."""
        found = [(inputs[f"x{i}"], {i}) for i in range(len(self.masked))]
        # Padding that anything reads is the caller's fault: masks come before mixers, as models have it.
        found += [(x * inputs[self.names[i]][..., None], {i}) for i, (x, _) in enumerate(found) if self.masked[i]]
        for kind, a, b in self.steps:
            x, of = found[a % len(found)]
            y, others = found[b % len(found)]
            if kind == "mix":
                found.append((mix(x), of))
            elif kind == "silu":
                found.append((F.silu(x), of))
            elif kind == "center":
                found.append((x - x.mean(-1, keepdim=True), of))
            elif kind == "flip":
                found.append((x.flip(-1) * 2, of))
            elif kind == "add" and x.shape == y.shape:
                found.append((x + y, of | others))
            elif "mask" in kind and len(of) == 1 and (own := self.names.get(next(iter(of)))):
                found.append((x * inputs[own][..., None], of))
        return found

    def real(self, of: set[int], groups: list[set[int]], shape) -> torch.Tensor:
        """Positions that are tokens of everything an output was made from."""
        if not all(self.masked[i] for i in of):  # an input without a mask has that of the sequence it belongs to
            of = set().union(*(group for group in groups if group & of))
        mask = torch.ones(shape[:2], dtype=torch.bool)
        for i in of:
            if self.masked[i]:
                mask &= self.inputs[self.names[i]].bool()
        return mask


def groups_of(results) -> list[set[int]]:
    """Inputs that belong together because an output was made from both."""
    groups: list[set[int]] = []
    for _, of in results:
        joined = set(of).union(*(group for group in groups if group & of))
        groups = [group for group in groups if not group & joined] + [joined]
    return groups


def check(seed: int) -> None:
    graph = RandomGraph(seed)
    with torch.no_grad():
        expected = graph(graph.inputs)
        groups = groups_of(expected)
        torch._dynamo.reset()

        def outputs(**inputs):
            return [value for value, _ in graph(inputs)]

        actual = torch.compile(outputs, backend="packc", options={"packc.inner": "eager"})(**graph.inputs)
    for got, (want, of) in zip(actual, expected, strict=True):
        real = graph.real(of, groups, want.shape)
        torch.testing.assert_close(got[real], want[real], rtol=1e-5, atol=1e-5, msg=lambda m: f"seed {seed}: {m}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seeds", [range(i, i + 8) for i in range(0, 24, 8)])
def test_random_graphs_keep_every_real_position(seeds):
    for seed in seeds:
        check(seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seeds", [range(i, i + 50) for i in range(100, 600, 50)])
def test_many_random_graphs_keep_every_real_position(seeds):
    for seed in seeds:
        check(seed)


def test_rows_of_ids_and_mask_may_have_two_symbols():
    """The model does not make them meet: a mask of keys is spread over the rows of the ids, by an index."""

    def model(ids, attention_mask):
        x = F.embedding(ids, torch.ones(8, 4))
        rows = torch.arange(ids.shape[0])[:, None, None, None]
        visible = attention_mask.bool()[rows, torch.arange(ids.shape[1])]
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], visible)[:, 0]

    compiled = torch.compile(model, backend="packc", options={"packc.inner": "aot_eager", "packc.strict": True})
    for step, rows in enumerate((["1110", "1100"], ["1110", "1100", "1111"], ["11100", "11000", "11110", "11111"])):
        mask = masks(rows)
        ids = torch.randint(0, 8, mask.shape)
        with torch._dynamo.config.patch(error_on_recompile=step > 2):
            torch.testing.assert_close(compiled(ids, mask)[mask.bool()], model(ids, mask)[mask.bool()])
