"""An indexer that drops pools by the data is one graph in packc's, and chooses the tokens that the original does."""

import pytest
import torch

import packc.frontends
from packc.frontends.hf_indexers import indexer
from packc.ops.topk_among import topk_among

modeling = pytest.importorskip("transformers.models.glm5_next.modeling_glm5_next", reason="transformers is older")
packc.frontends.install()

L, HIDDEN, RANK = 23, 16, 8
place = torch.arange(L)
MASKS = {
    "right": place < torch.tensor([[9], [15], [3]]),
    "left": place >= torch.tensor([[8], [2], [20]]),
    "both, and a row without tokens": (place >= torch.tensor([[4], [0], [0]]))
    & (place < torch.tensor([[17], [23], [0]])),
    "holes": torch.rand(3, L, generator=torch.Generator().manual_seed(0)) < 0.8,
}


def tiny_indexer(tail):
    torch.manual_seed(0)
    config = modeling.Glm5NextTextConfig(
        hidden_size=HIDDEN,
        q_lora_rank=RANK,
        index_topk=8,
        index_head_dim=4,
        index_n_heads=2,  # so that many scores are zero, and equal
        index_kpool=4,
        index_kpool_always_select_tail=tail,
    )
    made = modeling.Glm5NextTextIndexer(config, 0)
    torch.nn.init.normal_(made.index_kpool_compress_ape)
    torch.nn.init.normal_(made.index_kpool_compress_gate)
    return made


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_it_chooses_what_the_original_does(mask, tail):
    made, mask = tiny_indexer(tail), MASKS[mask]
    inputs = torch.randn(3, L, HIDDEN), torch.randn(3, L, RANK), mask, None
    expected, actual = made(*inputs), indexer(made, *inputs)
    assert actual.shape == expected.shape
    assert torch.equal(actual.sort().values, expected.sort().values)


def test_it_is_one_graph(packc_backend):
    made = tiny_indexer(True)
    inputs = torch.randn(3, L, HIDDEN), torch.randn(3, L, RANK), MASKS["right"], None
    actual = torch.compile(made, backend=packc_backend, fullgraph=True)(*inputs)
    assert torch.equal(actual.sort().values, made(*inputs).sort().values)


@pytest.mark.parametrize("k", [2, 4])
def test_topk_among_some_columns(k):
    x, among = torch.tensor([[5.0, 1.0, 4.0, 3.0, 2.0]]), torch.tensor([False, True, True, True, False])
    assert topk_among(x, among, k).tolist() == [[2, 3, 1, -1][:k]]
    torch.library.opcheck(torch.ops.packc.topk_among.default, (x, among, k))
