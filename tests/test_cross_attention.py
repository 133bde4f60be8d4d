"""Attention from one sequence to another: of packed queries to packed keys, where its mask is that of the keys."""

import copy

import pytest
import torch
import transformers
from harness import BOTH, EMPTY_ROW, HOLE, LEFT, RIGHT, RecordingBackend, masks
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import packc
from packc.passes.axes import BATCH, SEQ, Whole
from packc.passes.axes import OTHER as ANY
from packc.passes.graph import Tokens
from packc.passes.reading import NotTokenwise, Reading
from packc.passes.rules.attention import _ACROSS, varlen_attention
from packc.passes.rules.registry import Op
from packc.passes.visible import Band

DEBUG = {"packc.inner": "aot_eager"}
OTHER = ["11000", "11111", "11110"]
AS_LONG = ["11000000", "11111111", "11111100"]


def heads(x):
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


class Translator(nn.Module):
    """Self-attention in each, and attention of the one to the other, written as libraries do."""

    def __init__(self, written_out=False, hidden=8):
        super().__init__()
        self.tokens, self.head = nn.Embedding(32, hidden), nn.Linear(hidden, 32)
        self.mix, self.of_others = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, 3 * hidden)
        self.written_out = written_out

    def attend(self, q, k, v, visible):
        if not self.written_out:
            return F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2)
        added = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, torch.finfo(q.dtype).min)
        return ((q @ k.mT * 0.5 + added).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask):
        h, d = self.tokens(input_ids), self.tokens(decoder_input_ids)
        places = torch.arange(d.shape[1])
        keys, own = attention_mask.bool()[:, None, None], decoder_attention_mask.bool()[:, None, None]
        h = h + self.attend(*map(heads, self.mix(h).chunk(3, -1)), keys)
        d = d + self.attend(*map(heads, self.mix(d).chunk(3, -1)), own & (places <= places[:, None]))
        q, (_, k, v) = self.of_others(d)[..., :8], self.of_others(h.relu()).chunk(3, -1)
        d = d + self.attend(*map(heads, (q, k, v)), keys)
        return self.head(d.relu()), h


def batch_of(rows, others):
    ids = [torch.randint(1, 32, masks(each).shape) for each in (rows, others)]
    return ids[0], masks(rows), ids[1], masks(others)


def step(model, exact, batch):
    """Results at tokens, and all gradients."""
    results = [out[real == 1] for out, real in zip(model(*batch), (batch[3], batch[1]), strict=True)]
    loss = sum(each.square().sum() for each in results)
    return [*results, *torch.autograd.grad(loss, list(exact.parameters()))]


def compared(model, compiled, batch):
    exact = copy.deepcopy(model).double()
    for got, want in zip(step(compiled, model, batch), step(exact, exact, batch), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("written_out", [pytest.param(False, id="op", marks=pytest.mark.slow), True])
def test_both_sequences_are_packed_and_so_is_what_is_between_them(written_out):
    model = Translator(written_out)
    compiled = torch.compile(model, backend="packc", options=DEBUG, dynamic=True)
    for rows, others in ((RIGHT, OTHER), (LEFT, AS_LONG), (BOTH, OTHER)):
        compared(model, compiled, batch_of(rows, others))
    report = packc.explain(model)(*batch_of(RIGHT, OTHER))
    assert [stream.tokens for stream in report.streams] == [15, 11]
    assert [mixer.packed for mixer in report.mixers] == [True, True, True]
    assert report.boundaries == []


class Renamed(Translator):
    """The decoder's mask has the likelier name."""

    def forward(self, encoder_input_ids, encoder_attention_mask, input_ids, attention_mask):
        return super().forward(encoder_input_ids, encoder_attention_mask, input_ids, attention_mask)


@pytest.mark.parametrize("kind", [Translator, Renamed])
def test_only_outputs_are_scattered(kind):
    backend = RecordingBackend("eager")
    torch.compile(kind(), backend=backend)(*batch_of(RIGHT, OTHER))
    (call,) = backend.after[-1].graph.find_nodes(op="call_function", target=torch.ops.packc.cross_attention.default)
    assert [each.name for each in call.args[3:5]] == ["packc_cu_seqlens_1", "packc_cu_seqlens"]
    assert backend.op_count(torch.ops.packc.unpack.default) == 2


@pytest.mark.slow
def test_keys_are_packed_for_queries_that_have_no_mask():
    class Unmasked(Translator):
        def forward(self, input_ids, attention_mask, decoder_input_ids):
            return super().forward(input_ids, attention_mask, decoder_input_ids, torch.ones_like(decoder_input_ids))

    model, batch = Unmasked(), batch_of(RIGHT, OTHER)
    report = packc.explain(model)(*batch[:3])
    assert [stream.mask for stream in report.streams] == ["attention_mask"]
    assert [mixer.packed for mixer in report.mixers] == [True, True]
    compiled = torch.compile(model, backend="packc", options=DEBUG)
    torch.testing.assert_close(compiled(*batch[:3])[0], model(*batch[:3])[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_row_without_a_query():
    model = Translator()
    compiled = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True})
    compared(model, compiled, batch_of(RIGHT, ["11000", "00000", "11110"]))


def test_a_row_reads_no_bit_of_another_row_s_keys():
    model = Translator()
    compiled = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True})
    batch = batch_of(RIGHT, OTHER)
    before = [out.detach() for out in compiled(*batch)]
    batch[0][1] = (batch[0][1] + 7) % 32
    after = [out.detach() for out in compiled(*batch)]
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert not torch.equal(a[1], b[1])


def test_a_mask_that_hides_more_than_padding_stays_padded():
    class Narrow(Translator):
        def attend(self, q, k, v, visible):
            if q.shape[2] != k.shape[2]:
                visible = visible & (torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + 1)
            return super().attend(q, k, v, visible)

    model = Narrow()
    report = packc.explain(model)(*batch_of(RIGHT, OTHER))
    assert len(report.streams) == 2
    assert [mixer.packed for mixer in report.mixers] == [True, True]
    assert "a mask that hides more than its padding, or adds" in report.boundaries[0].reason
    compared(model, torch.compile(model, backend="packc", options=DEBUG), batch_of(RIGHT, OTHER))


@pytest.mark.slow
def test_a_bias_between_two_sequences_stays_padded():
    class Biased(Translator):
        def attend(self, q, k, v, visible):
            added = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, torch.finfo(q.dtype).min)
            if q.shape[2] != k.shape[2]:
                added = added + 0.5 * (torch.arange(k.shape[2]) == 1)
            return F.scaled_dot_product_attention(q, k, v, added).transpose(1, 2).flatten(2)

    model = Biased()
    report = packc.explain(model)(*batch_of(RIGHT, OTHER))
    assert "a mask that hides more than its padding, or adds" in report.boundaries[0].reason
    compared(model, torch.compile(model, backend="packc", options=DEBUG), batch_of(RIGHT, OTHER))


def test_what_a_gpu_has_no_kernel_for_stays_padded():
    graph = torch.fx.Graph()
    q, k = graph.placeholder("q"), graph.placeholder("k")
    node = graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, (q, k, k))
    with FakeTensorMode():
        for each, length in ((node, 5), (q, 5), (k, 8)):
            each.meta["val"] = torch.empty(3, 2, length, 4, device="cuda")
    of_keys = Reading(Whole.OF_OTHERS, {k: (BATCH, ANY, SEQ, ANY)}, padded=_ACROSS)
    with pytest.raises(NotTokenwise, match="in torch.float32 on cuda: runs padded"):
        varlen_attention(Op(node, Tokens(), 3, 8), Band(causal=False), of_keys)


@pytest.mark.filterwarnings("ignore:packc left")
def test_rows_that_run_whole():
    model = Translator(written_out=True)
    compared(model, torch.compile(model, backend="packc", options=DEBUG), batch_of(HOLE, AS_LONG))


@pytest.mark.filterwarnings("ignore:packc left")
@pytest.mark.parametrize("rows", [HOLE, pytest.param(EMPTY_ROW, marks=pytest.mark.slow)])
def test_padding_that_a_batch_keeps_stays_hidden_where_no_other_attention_would_see_it(rows):
    def function(x, attention_mask, y, decoder_attention_mask):
        keys, queries = x * attention_mask[..., None], y * decoder_attention_mask[..., None]
        k, q = (heads(packc.ops.causal_conv1d(each, taps)) for each in (keys, queries))
        return F.scaled_dot_product_attention(q, k, k + 1, attention_mask.bool()[:, None, None])

    taps = torch.randn(8, 3)
    batch = torch.randn(3, 8, 8), masks(rows), torch.randn(3, 5, 8), masks(OTHER)
    got = torch.compile(function, backend="packc", options=DEBUG)(*batch)
    want = function(*batch)
    real = (batch[3] == 1)[:, None, :, None].expand_as(want)
    torch.testing.assert_close(got[real], want[real], equal_nan=True)
    assert [each.packed for each in packc.explain(function)(*batch).mixers] == [True] * 3


def test_a_row_without_a_key():
    """Stock gives its queries a mean of padding, or what there is of a softmax of nothing."""
    model, batch = Translator(), batch_of(EMPTY_ROW, OTHER)
    compiled = torch.compile(model, backend="packc", options=DEBUG)
    with pytest.warns(UserWarning, match="another sequence attends to a row without tokens"):
        got = compiled(*batch)[0]
    torch.testing.assert_close(got[batch[3] == 1], model(*batch)[0][batch[3] == 1], equal_nan=True)
    model.written_out = True
    with pytest.raises(packc.NotPacked, match="a row without tokens"):
        compiled(*batch)
    compared(model, compiled, batch_of(EMPTY_ROW, ["11000", "00000", "11110"]))


def test_a_mask_that_shows_keys_of_padding_leaves_the_keys_unpacked():
    class Shows(Translator):
        def attend(self, q, k, v, visible):
            cross = q.shape[2] != k.shape[2]
            return super().attend(q, k, v, visible | True if cross else visible)

    model = Shows()
    report = packc.explain(model)(*batch_of(RIGHT, OTHER))
    assert [stream.mask for stream in report.streams] == ["decoder_attention_mask"]
    compared(model, torch.compile(model, backend="packc", options=DEBUG), batch_of(RIGHT, OTHER))


def test_documents_in_a_row_raise():
    compiled = torch.compile(Translator(), backend="packc", options=DEBUG)
    batch = batch_of(["11111111"] * 3, OTHER)
    for name, length in (("attention_mask", 8), ("decoder_attention_mask", 5)):
        numbers = torch.arange(length).ge(2).int().expand(3, length)
        with (
            packc.documents(seq_idx={name: numbers}),
            pytest.raises(packc.NotPacked, match="attends from one sequence"),
        ):
            compiled(*batch)


# ---- stock models ----------------------------------------------------------------------------------------------------


def tiny(family, **more):
    name = {"Marian": "MarianMTModel"}.get(family, f"{family}ForConditionalGeneration")
    sizes = {"d_model": 16, "vocab_size": 32, "pad_token_id": 0, "decoder_start_token_id": 2, "dropout": 0.0}
    if family == "T5":
        sizes |= {"d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    else:
        for part in ("encoder", "decoder"):
            sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 16}
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes, **more))


@pytest.mark.parametrize("rows", [RIGHT, pytest.param(LEFT, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Bart", {"attn_implementation": "eager"}),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("Bart", {"attn_implementation": "sdpa"}), ("Marian", {}), ("Pegasus", {}), ("T5", {}))
        ),
    ],
)
def test_losses_and_gradients_of_stock_models(family, more, rows):
    model = tiny(family, **more)
    ids, mask, decoder_ids, decoder_mask = batch_of(rows, OTHER)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
        "labels": decoder_ids.masked_fill(decoder_mask == 0, -100),
    }
    compiled = torch.compile(model, backend="packc", options=DEBUG)
    results = []
    for function in (model, compiled):
        loss = function(**batch).loss
        used = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        grads = torch.autograd.grad(loss, [each for _, each in used], allow_unused=True)
        results.append([loss, *(each for each in grads if each is not None)])
    report = packc.explain(model)(**batch)
    assert [stream.mask for stream in report.streams] == ["attention_mask", "decoder_attention_mask"]
    assert all(mixer.packed for mixer in report.mixers)
    assert not any("another" in boundary.reason for boundary in report.boundaries)
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().clamp(min=1e-2).item())
