"""explain says what happened: mixers, boundaries, tokens, and why something was not packed."""

import pytest
import torch
from harness import HOLE, RIGHT, PlainLM, batch_of, masks, tiny_mamba
from torch.nn import functional as F

import packc

TestCase = pytest.importorskip("expecttest").TestCase  # not on every machine that has a GPU


class TestExplain(TestCase):
    maxDiff = None

    def test_a_packed_model(self):
        report = packc.explain(tiny_mamba())(**batch_of(RIGHT))
        assert (report.tokens, report.padded_tokens, report.fallback) == (15, 24, None)
        self.assertExpectedInline(
            str(report),
            """\
packc: packed 4 of 4 mixers (1 graph)
  tokens      15 of 24 padded (37.5% left out)
  mixers      4
    packc.causal_conv1d.default   packed  backbone.layers.0.mixer
    packc.selective_scan.default  packed  backbone.layers.0.mixer
    packc.causal_conv1d.default   packed  backbone.layers.1.mixer
    packc.selective_scan.default  packed  backbone.layers.1.mixer
  boundaries  none""",
        )

    def test_a_batch_with_a_hole(self):
        report = packc.explain(tiny_mamba(layers=1))(**batch_of(HOLE))
        self.assertExpectedInline(
            str(report),
            """\
packc: packed 2 of 2 mixers (1 graph)
  tokens      19 of 24 padded (20.8% left out)
  mixers      2
    packc.causal_conv1d.default   packed  backbone.layers.0.mixer
    packc.selective_scan.default  packed  backbone.layers.0.mixer
  boundaries  none
  not packed  padding between tokens of a row""",
        )

    def test_no_mask(self):
        batch = batch_of(RIGHT)
        del batch["attention_mask"]
        self.assertExpectedInline(
            str(packc.explain(tiny_mamba(layers=1))(**batch)),
            """\
packc: nothing packed (1 graph)
  mixers      2
    packc.causal_conv1d.default   padded  backbone.layers.0.mixer
    packc.selective_scan.default  padded  backbone.layers.0.mixer
  boundaries  none
  not packed  no (B, L) padding mask among the inputs ['input_ids', 'labels']""",
        )

    def test_a_boundary(self):
        def pooled(x, mask):
            y = packc.ops.causal_conv1d(x * mask[..., None], torch.ones(4, 2)) * mask[..., None]
            return y.sum(1)

        report = packc.explain(pooled)(torch.randn(3, 8, 4), masks(RIGHT))
        (boundary,) = report.boundaries
        assert (boundary.node, boundary.module, boundary.reason) == (
            "aten.sum.dim_IntList",
            "",
            "reduces the L axis of (B, L, .)",
        )

    def test_what_packc_has_no_op_for_is_listed_where_it_looks_along_the_sequence(self):
        def moving_sum(x, mask):
            y = (x * mask[..., None]).exp()
            return y.sin(), y.cumsum(1)

        def after_a_mixer(x, mask):
            return packc.ops.causal_conv1d(x * mask[..., None], torch.ones(4, 2)).cumsum(1)

        for function, packed in ((moving_sum, True), (after_a_mixer, False)):
            with packc.config.patch(mask="mask"):
                report = packc.explain(function)(torch.randn(3, 8, 4), masks(RIGHT))
            assert [boundary.node for boundary in report.boundaries] == ["aten.cumsum.default"]
            assert (report.tokens is not None) == packed

    def test_two_graphs_are_both_reported(self):
        model = PlainLM()

        def broken(ids, mask):
            h = model.hidden(ids, mask)
            torch._dynamo.graph_break()
            return model.hidden(ids, mask) + h

        report = packc.explain(broken)(torch.randint(1, 32, (3, 8)), masks(RIGHT))
        assert report.graphs == 2
        assert [mixer.packed for mixer in report.mixers] == [True] * 4


def test_a_mixer_of_plain_torch_is_a_boundary():
    table, taps = torch.nn.Parameter(torch.randn(32, 8)), torch.nn.Parameter(torch.randn(8, 8, 4))

    def model(ids, attention_mask):
        h = F.embedding(ids, table)
        x = (h * attention_mask[..., None]).transpose(1, 2)
        return F.layer_norm(h + F.conv1d(x, taps, padding=2)[..., :-1].transpose(1, 2), (8,))

    report = packc.explain(model)(torch.randint(1, 32, (3, 8)), masks(RIGHT))
    assert "what looks along the sequence runs padded" in str(report)
    assert [boundary.node for boundary in report.boundaries] == ["aten.conv1d.default"]


def test_a_model_compiled_in_place_is_looked_at_itself():
    model, batch = tiny_mamba(), batch_of(RIGHT)
    model.compile(backend="packc", options={"packc.inner": "aot_eager"})
    model(**batch)
    assert packc.explain(model)(**batch).tokens == 15


def test_explaining_leaves_the_compiled_model_as_it_is():
    model, batch = tiny_mamba(), batch_of(RIGHT)
    compiled = torch.compile(model, backend="packc", options={"packc.inner": "aot_eager"})
    compiled(**batch)
    reports = [packc.explain(compiled)(**batch) for _ in range(10)]
    assert all(report.tokens == 15 and report.graphs == 1 for report in reports)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(**batch)


def test_options_are_those_of_the_compiled_model():
    def model(x, tokens):
        return packc.ops.causal_conv1d(x * tokens[..., None], torch.ones(4, 2))

    inputs = torch.randn(3, 8, 4), masks(RIGHT)
    assert packc.explain(model)(*inputs).tokens is None
    assert packc.explain(model, options={"packc.mask": "tokens", "packc.strict": True})(*inputs).tokens == 15
    with pytest.raises(ValueError, match="packc.masc"):
        packc.explain(model, options={"packc.masc": "tokens"})
