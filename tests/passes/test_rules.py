"""Each rule says the truth: an op on packed operands is the packed result of the op on padded ones.

Every snippet is traced on padded inputs, packed, and run on both; they must agree at every token, and the packed graph
must really work on tokens. Sizes coincide on purpose: B, L, heads and features are told apart by rule, not by value.
"""

import einops
import pytest
import torch
from harness import RecordingBackend, masks
from torch.nn import functional as F

import packc

H = 4  # features; also the number of rows and of positions below
W = torch.randn(H, H, generator=torch.Generator().manual_seed(1))

POINTWISE = {
    "silu": lambda x, m: F.silu(x),
    "scale": lambda x, m: x * 2 + 1,
    "with mask": lambda x, m: x * m[:, :, None],
    "where": lambda x, m: torch.where(m[..., None] > 0, x, 0.0),
    "masked fill": lambda x, m: x.masked_fill(m[..., None] == 0, -1.0),
    "with a feature vector": lambda x, m: x * W[0],
    "with a position table": lambda x, m: x + W[None],
    "with a position table of rank two": lambda x, m: x + W,
    "with a value per row": lambda x, m: x + W[:, None, :],
    "with a value per row and position": lambda x, m: x * W[:, :, None],
    "with itself, transposed twice": lambda x, m: x + x.transpose(1, 2).transpose(1, 2),
    "cast": lambda x, m: x.double().to(x.dtype),
    "dropout off": lambda x, m: F.dropout(x, 0.5, training=False),
    "like": lambda x, m: torch.ones_like(x) + x,
    "type as": lambda x, m: m.type_as(x)[..., None] * x,
    "clamp": lambda x, m: x.clamp(min=0.1),
    "comparison": lambda x, m: (x > 0).float(),
}
VIEWS = {
    "flatten tokens": lambda x, m: F.silu(x.view(-1, H)).view(H, H, H),
    "flatten tokens and features apart": lambda x, m: x.reshape(H * H, 2, 2).sum(-1).view(H, H, 2),
    "heads": lambda x, m: x.view(H, H, 2, 2).transpose(1, 2).softmax(-1).transpose(1, 2).flatten(2),
    "rearrange": lambda x, m: einops.rearrange(
        einops.rearrange(x, "b l (h d) -> b h l d", h=2), "b h l d -> b l (h d)"
    ),
    "channels first": lambda x, m: (x.transpose(1, 2) * 2).transpose(1, 2),
    "permute": lambda x, m: x.permute(2, 1, 0).exp().permute(2, 1, 0),
    "time first": lambda x, m: x.transpose(0, 1).contiguous().transpose(0, 1),
    "chunk": lambda x, m: x.chunk(2, -1)[0] * x.chunk(2, -1)[1],
    "split": lambda x, m: torch.cat(x.split([1, 3], dim=2)[::-1], -1),
    "unbind": lambda x, m: torch.stack(x.unbind(-1)[::-1], -1),
    "select": lambda x, m: x * x[:, :, 0].unsqueeze(-1),
    "slice features": lambda x, m: F.pad(x[..., 1:], (1, 0)),
    "slice nothing": lambda x, m: x[:, 0:, :],
    "expand": lambda x, m: x[:, :, None, :].expand(-1, -1, 3, -1).sum(2),
    "expand with sizes": lambda x, m: x[:, :, None, :].expand(H, H, 3, H).mean(2),
    "squeeze": lambda x, m: x.unsqueeze(-1).squeeze(-1),
    "squeeze all": lambda x, m: x.unsqueeze(-1).squeeze(),
    "repeat interleave by view": lambda x, m: x[..., None].expand(H, H, H, 2).reshape(H, H, 2 * H),
}
PRODUCTS = {
    "linear": lambda x, m: F.linear(x, W, W[0]),
    "matmul with a weight": lambda x, m: x @ W,
    "weight times channels first": lambda x, m: (W @ x.transpose(1, 2)).transpose(1, 2),
    "matmul with a vector": lambda x, m: (x @ W[0])[..., None] * x,
    "per token product": lambda x, m: (x.unsqueeze(-1) @ x.unsqueeze(-2)).sum(-1),
    "mm on flat tokens": lambda x, m: torch.mm(x.view(-1, H), W).view(H, H, H),
    "addmm on flat tokens": lambda x, m: torch.addmm(W[0], x.view(-1, H), W).view(H, H, H),
    "einsum with a weight": lambda x, m: torch.einsum("bld,de->ble", x, W),
    "einsum of tokens": lambda x, m: torch.einsum("bld,ble->blde", x, x).sum(-1),
}
REDUCTIONS = {
    "mean": lambda x, m: x - x.mean(-1, keepdim=True),
    "sum": lambda x, m: x.sum(2)[..., None] * x,
    "variance": lambda x, m: x / x.var(-1, keepdim=True),
    "softmax": lambda x, m: x.softmax(-1),
    "layer norm": lambda x, m: F.layer_norm(x, (H,), W[0], W[1]),
    "rms norm": lambda x, m: F.rms_norm(x, (H,), W[0]),
    "topk": lambda x, m: x.topk(2, -1).values,
    "argmax": lambda x, m: x.argmax(-1).float(),
    "cumulative sum of features": lambda x, m: x.cumsum(-1),
    "norm": lambda x, m: F.normalize(x, dim=-1),
    "gather": lambda x, m: x.gather(-1, x.argsort(-1)),
    "one hot": lambda x, m: F.one_hot(x.argmax(-1), H).float(),
    "embedding": lambda x, m: F.embedding(x.argmax(-1), W),
    "logsumexp": lambda x, m: x.logsumexp(-1),
}
SNIPPETS = {**POINTWISE, **VIEWS, **PRODUCTS, **REDUCTIONS}


TAPS = torch.randn(H, 2, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", SNIPPETS)
def test_packing_commutes_with(name):
    mask = masks(["1111", "1110", "1100", "0110"])

    def after_a_mixer(x, mask):
        # What comes out of a mixer exists packed only: the snippet must work on tokens, or the graph is not packed.
        return SNIPPETS[name](packc.ops.causal_conv1d(x * mask[..., None], TAPS), mask)

    x, backend = torch.randn(H, H, H), RecordingBackend("eager")
    expected = after_a_mixer(x, mask)
    actual = torch.compile(after_a_mixer, backend=backend, fullgraph=True)(x, mask)
    assert not backend.reasons
    assert backend.op_count(torch.ops.packc.unpack.default) == 1
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])
    assert actual[mask == 0].eq(0).all()
