"""A gate that a scan wants behind its exchange alone is a product of its own."""

import pytest
import torch
from torch import fx

from packc.passes.split_products import split_products

aten = torch.ops.aten
T, READ, D = 6, 4, 5


def graph_of(cut, *, bias=True, transposed=False, widths=(D, D), other_user=False):
    """``both = linear(h, W)``; ``u, z`` of it, something that writes, and a scan whose gate is ``z``."""
    graph = fx.Graph()
    names = ("h", "weight", *(("bias",) if bias else ()), "delta", "A", "B", "C")
    h, weight, *others = (graph.placeholder(name) for name in names)
    weight.meta["val"] = torch.empty(sum(widths), READ)
    both = graph.call_function(aten.linear.default, (h, weight, *others[:-4]))
    moved = graph.call_function(aten.transpose.int, (both, 1, -1)) if transposed else both
    pieces = graph.call_function(*cut(moved, -2 if transposed else -1))
    u, z = (graph.call_function(aten.alias.default, (fx.Proxy(pieces)[n].node,)) for n in range(2))
    if transposed:
        u, z = (graph.call_function(aten.transpose.int, (x, 2, 1)) for x in (u.args[0], z.args[0]))
    else:
        u, z = (x.args[0] for x in (u, z))
    scan = torch.ops.packc.selective_scan_sharded.default
    result = graph.call_function(scan, (u, *others[-4:], None, z))
    graph.output((result, both) if other_user else (result,))
    graph.eliminate_dead_code()
    return fx.GraphModule(torch.nn.Module(), graph)


def chunk(x, dim):
    return aten.chunk.default, (x, 2, dim)


def sizes(x, dim):
    return aten.split_with_sizes.default, (x, [D, D], dim)


def run(gm, **given):
    """What the scan is given, in the place of its result."""
    for node in gm.graph.nodes:
        if node.target is torch.ops.packc.selective_scan_sharded.default:
            node.target = lambda u, *others: (u, others[-1])
    gm.recompile()
    return gm(*given.values())[0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cut", [chunk, sizes])
def test_it_is_made_where_it_is_wanted(cut, bias, transposed):
    given = {"h": torch.randn(1, T, READ), "weight": torch.randn(2 * D, READ)}
    given |= {"bias": torch.randn(2 * D)} if bias else {}
    given |= dict.fromkeys(["delta", "A", "B", "C"])
    how = {"bias": bias, "transposed": transposed}
    want = run(graph_of(cut, **how), **given)
    gm = graph_of(cut, **how)
    split_products(gm)
    products = [node for node in gm.graph.nodes if node.target is aten.linear.default]
    assert len(products) == 2
    between = [node for node in gm.graph.nodes if products[0] < node < products[1] and node.op == "call_function"]
    assert [node.target for node in between] == [aten.transpose.int] * (2 * transposed)
    for found, expected in zip(run(gm, **given), want, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("how", [{"widths": (2 * D - 2, 2)}, {"other_user": True}])
def test_it_stays_where_it_is_narrow_or_whole_for_others(how):
    def cut(x, dim):
        return aten.split_with_sizes.default, (x, list(how.get("widths", (D, D))), dim)

    gm = graph_of(cut, **how)
    split_products(gm)
    assert sum(node.target is aten.linear.default for node in gm.graph.nodes) == 1
