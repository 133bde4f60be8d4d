"""What each pass makes of a small model, line by line."""

from dataclasses import replace

import pytest
import torch
from harness import code, masks
from torch.nn import functional as F

import packc
from packc.passes import Graph, fakify
from packc.passes.axes import Whole, show
from packc.pipeline import FIND, PACK, READ

TestCase = pytest.importorskip("expecttest").TestCase  # not on every machine that has a GPU


def stages(function, *inputs, dynamic=False):
    """The graph of ``function`` after each pass, by the pass's name."""
    graphs = {}

    def record(gm, example_inputs):
        graphs["dynamo"] = code(gm)
        graph = Graph(gm, fakify(gm, example_inputs))
        for each in READ:
            graph = each(graph)
            graphs[each.__name__] = code(graph.gm)
        (mask,) = graph.masks
        graph = replace(graph, mask=mask)
        for each in (*FIND, *PACK):
            graph = each(graph)
        kinds = graph.tokens.kinds
        graphs["layout"] = "\n".join(
            f"{node.name} {show(kinds[node]) if isinstance(kinds[node], tuple) else ''}".rstrip()
            for node in mask.graph.nodes
            if node in kinds and not isinstance(kinds[node], Whole)
        )
        graphs["pack"] = code(graph.gm)
        return gm.forward

    with packc.config.patch(mask="mask"):
        torch.compile(function, backend=record, fullgraph=True, dynamic=dynamic)(*inputs)
    return graphs


class TestPasses(TestCase):
    maxDiff = None

    def setUp(self):
        torch._dynamo.reset()

    def test_a_gated_mixer(self):
        taps, weight = torch.randn(6, 3), torch.nn.Parameter(torch.randn(6, 6))

        def gated_mixer(x, mask):
            y = (x * mask[..., None]).transpose(1, 2)
            y = packc.ops.causal_conv1d(y.transpose(1, 2), taps, activation="silu")
            return F.linear(y, weight) + x

        graphs = stages(gated_mixer, torch.randn(2, 5, 6), masks(["11100", "11111"]))
        self.assertExpectedInline(
            graphs["dynamo"],
            """\
getitem = getitem(l_mask_, (Ellipsis, None))
mul = mul(l_x_, getitem)
y = transpose(mul, 1, 2)
like = transpose(y, 1, 2)
causal_conv1d_default = packc.causal_conv1d.default(like, l_taps_, None, silu, None, None, False)
out = getitem(causal_conv1d_default, 0)
linear = linear(out, l_weight_)
add = add(linear, l_x_)
return (add)""",
        )
        self.assertExpectedInline(
            graphs["normalize"],
            """\
unsqueeze = aten.unsqueeze.default(l_mask_, 2)
mul = aten.mul.Tensor(l_x_, unsqueeze)
transpose = aten.transpose.int(mul, 1, 2)
transpose_1 = aten.transpose.int(transpose, 1, 2)
causal_conv1d = packc.causal_conv1d.default(transpose_1, l_taps_, None, silu, None, None, False)
getitem = getitem(causal_conv1d, 0)
getitem_1 = getitem(causal_conv1d, 1)
linear = aten.linear.default(getitem, l_weight_)
add = aten.add.Tensor(linear, l_x_)
return (add)""",
        )
        self.assertExpectedInline(
            graphs["layout"],
            """\
l_mask_ (B, L)
l_x_ (B, L, .)
unsqueeze (B, L, .)
mul (B, L, .)
causal_conv1d
getitem (B, L, .)
linear (B, L, .)
add (B, L, .)""",
        )
        self.assertExpectedInline(
            graphs["pack"],
            """\
sym_size_int = aten.sym_size.int(packc_index, 0)
pack_default = packc.pack.default(l_mask_, packc_index)
unsqueeze_default = aten.unsqueeze.default(pack_default, 2)
pack_default_1 = packc.pack.default(l_x_, packc_index)
mul_tensor = aten.mul.Tensor(pack_default_1, unsqueeze_default)
causal_conv1d_default = packc.causal_conv1d.default(mul_tensor, l_taps_, None, silu, packc_cu_seqlens, None, False)
getitem = getitem(causal_conv1d_default, 0)
linear_default = aten.linear.default(getitem, l_weight_)
add_tensor = aten.add.Tensor(linear_default, pack_default_1)
unpack_default = packc.unpack.default(add_tensor, packc_index, 2, 5)
return (unpack_default)""",
        )

    def test_a_next_token_loss_of_any_length(self):
        def next_token_loss(x, mask, labels):
            logits = packc.ops.causal_conv1d(x * mask[..., None], taps)
            return F.cross_entropy(logits[:, :-1].reshape(-1, 6), labels[:, 1:].reshape(-1))

        taps = torch.randn(6, 3)
        labels = torch.randint(0, 6, (2, 5))
        graphs = stages(next_token_loss, torch.randn(2, 5, 6), masks(["11100", "11111"]), labels, dynamic=True)
        self.assertExpectedInline(
            graphs["normalize"],
            """\
unsqueeze = aten.unsqueeze.default(l_mask_, 2)
mul = aten.mul.Tensor(l_x_, unsqueeze)
causal_conv1d = packc.causal_conv1d.default(mul, l_taps_, None, None, None, None, False)
getitem = getitem(causal_conv1d, 0)
getitem_1 = getitem(causal_conv1d, 1)
slice_1 = aten.slice.Tensor(getitem, 0, 0, 9223372036854775807)
slice_2 = aten.slice.Tensor(slice_1, 1, 0, -1)
reshape = aten.reshape.default(slice_2, (-1, 6))
slice_3 = aten.slice.Tensor(l_labels_, 0, 0, 9223372036854775807)
slice_4 = aten.slice.Tensor(slice_3, 1, 1, 9223372036854775807)
reshape_1 = aten.reshape.default(slice_4, (-1))
cross_entropy_loss = aten.cross_entropy_loss.default(reshape, reshape_1)
return (cross_entropy_loss)""",
        )
        self.assertExpectedInline(
            graphs["widen_losses"],
            """\
unsqueeze = aten.unsqueeze.default(l_mask_, 2)
mul = aten.mul.Tensor(l_x_, unsqueeze)
causal_conv1d = packc.causal_conv1d.default(mul, l_taps_, None, None, None, None, False)
getitem = getitem(causal_conv1d, 0)
slice_1 = aten.slice.Tensor(getitem, 0, 0, 9223372036854775807)
slice_3 = aten.slice.Tensor(l_labels_, 0, 0, 9223372036854775807)
slice_4 = aten.slice.Tensor(slice_3, 1, 1, 9223372036854775807)
reshape_1 = aten.reshape.default(slice_4, (-1))
reshape_default = aten.reshape.default(slice_1, (-1, 6))
sym_size_int_3 = aten.sym_size.int(l_mask_, 0)
reshape_default_1 = aten.reshape.default(reshape_1, (sym_size_int_3, -1))
new_full_default = aten.new_full.default(reshape_default_1, (sym_size_int_3, 1), -100)
cat_default = aten.cat.default((reshape_default_1, new_full_default), 1)
reshape_default_2 = aten.reshape.default(cat_default, (-1))
cross_entropy_loss_default = aten.cross_entropy_loss.default(reshape_default, reshape_default_2)
return (cross_entropy_loss_default)""",
        )
        self.assertExpectedInline(
            graphs["pack"],
            """\
sym_size_int = aten.sym_size.int(packc_index, 0)
sym_size_int_1 = aten.sym_size.int(l_mask_, 0)
sym_size_int_2 = aten.sym_size.int(l_mask_, 1)
pack_default = packc.pack.default(l_mask_, packc_index)
unsqueeze_default = aten.unsqueeze.default(pack_default, 2)
pack_default_1 = packc.pack.default(l_x_, packc_index)
mul_tensor = aten.mul.Tensor(pack_default_1, unsqueeze_default)
causal_conv1d_default = packc.causal_conv1d.default(mul_tensor, l_taps_, None, None, packc_cu_seqlens, None, False)
getitem = getitem(causal_conv1d_default, 0)
alias_default = aten.alias.default(getitem)
slice_3 = aten.slice.Tensor(l_labels_, 0, 0, 9223372036854775807)
slice_4 = aten.slice.Tensor(slice_3, 1, 1, 9223372036854775807)
reshape_1 = aten.reshape.default(slice_4, (-1))
reshape_default = aten.reshape.default(alias_default, (sym_size_int, 6))
sym_size_int_3 = aten.sym_size.int(l_mask_, 0)
reshape_default_1 = aten.reshape.default(reshape_1, (sym_size_int_3, -1))
new_full_default = aten.new_full.default(reshape_default_1, (sym_size_int_3, 1), -100)
cat_default = aten.cat.default((reshape_default_1, new_full_default), 1)
reshape_default_2 = aten.reshape.default(cat_default, (-1))
index_select_default = aten.index_select.default(reshape_default_2, 0, packc_index)
cross_entropy_loss_default = aten.cross_entropy_loss.default(reshape_default, index_select_default)
return (cross_entropy_loss_default)""",
        )

    def test_an_in_place_residual(self):
        def residual(x, mask):
            y = x * mask[..., None]
            y += 1
            return y

        graphs = stages(residual, torch.randn(2, 5, 6), masks(["11100", "11111"]))
        self.assertExpectedInline(
            graphs["normalize"],
            """\
unsqueeze = aten.unsqueeze.default(l_mask_, 2)
mul = aten.mul.Tensor(l_x_, unsqueeze)
add_ = aten.add_.Tensor(mul, 1)
return (add_)""",
        )
        self.assertExpectedInline(
            graphs["functional"],
            """\
unsqueeze = aten.unsqueeze.default(l_mask_, 2)
mul = aten.mul.Tensor(l_x_, unsqueeze)
add_tensor = aten.add.Tensor(mul, 1)
return (add_tensor)""",
        )

    def test_values_per_row_and_per_position(self):
        def broadcast(x, mask, per_row):
            x = x * mask[..., None] + per_row[:, None, :]
            return x + torch.arange(x.shape[1])[:, None]

        graphs = stages(broadcast, torch.randn(2, 5, 6), masks(["11100", "11111"]), torch.randn(2, 6))
        self.assertExpectedInline(
            graphs["pack"],
            """\
sym_size_int = aten.sym_size.int(packc_index, 0)
pack_default = packc.pack.default(l_mask_, packc_index)
unsqueeze_default = aten.unsqueeze.default(pack_default, 2)
pack_default_1 = packc.pack.default(l_x_, packc_index)
mul_tensor = aten.mul.Tensor(pack_default_1, unsqueeze_default)
unsqueeze_1 = aten.unsqueeze.default(l_per_row_, 1)
div_scalar_mode = aten.div.Scalar_mode(packc_index, 5, rounding_mode=floor)
index_select_default = aten.index_select.default(unsqueeze_1, 0, div_scalar_mode)
transpose_int = aten.transpose.int(index_select_default, 0, 1)
add_tensor = aten.add.Tensor(mul_tensor, transpose_int)
arange = aten.arange.default(5, device=cpu, pin_memory=False)
counted_anew_default = packc.counted_anew.default(packc_index, packc_cu_seqlens, 5)
positions_default = packc.positions.default(counted_anew_default, 5)
index_select_default_1 = aten.index_select.default(arange, 0, positions_default)
unsqueeze_default_1 = aten.unsqueeze.default(index_select_default_1, 1)
add_tensor_1 = aten.add.Tensor(add_tensor, unsqueeze_default_1)
unpack_default = packc.unpack.default(add_tensor_1, packc_index, 2, 5)
return (unpack_default)""",
        )
