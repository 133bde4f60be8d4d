"""Functions of tokens ``(B, L, H)`` and a mask: each is made of ops with rules, and of nothing that mixes tokens.

Sizes coincide on purpose: B, L, heads and features are told apart by rule, not by value.
"""

import einops
import torch
from torch.nn import functional as F

H = 4  # features; also the number of rows and of positions below
aten = torch.ops.aten
W = torch.randn(H, H, generator=torch.Generator().manual_seed(1))


def spread_by_correction(x):
    return x.std(-1, correction=0) + x.var(-1, correction=0) + torch.var_mean(x, -1, correction=0)[0]


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
    "type as": lambda x, m: m.type_as(x)[..., None] * x.type_as(x.double()).type_as(x),
    "clamp": lambda x, m: x.clamp(min=0.1),
    "comparison": lambda x, m: (x > 0).float(),
    "activations": lambda x, m: F.gelu(F.relu(x) + x.tanh() + F.leaky_relu(x) + F.hardswish(x) + F.selu(x) + F.mish(x)),
    "roots and signs": lambda x, m: x.square().sqrt() - x.abs() + (-x),
    "quotients": lambda x, m: aten.div.Scalar(aten.mul.Scalar(x, 2), 3) / (1 + x.square()),
    "copies": lambda x, m: aten.lift_fresh_copy(aten._to_copy(x.clone().detach())).to("cpu", torch.float64).float(),
    "moved to a device": lambda x, m: x.to("cpu", copy=True).to(x),
    "with a layout": lambda x, m: aten.to.dtype_layout(x, dtype=torch.float64, layout=torch.strided).float(),
    "as another": lambda x, m: aten.to.other(m[..., None], x) * aten.to.other(x, x.double()).float(),
    "filled alike": lambda x, m: (
        torch.zeros_like(x)
        + torch.full_like(x, 2.0)
        + aten.fill(aten.fill(torch.empty_like(x), 1.0), torch.tensor(2.0))
        + x
    ),
    "filled by a tensor": lambda x, m: x.masked_fill(m[..., None] == 0, torch.tensor(3.0)),
    "chosen from numbers": lambda x, m: (
        torch.where(x > 0, 1.0, x) + torch.where(x > 0, x, 2.0) + torch.where(x > 0, 3, 4)
    ),
    "draws that change nothing": lambda x, m: (
        x
        + 0 * (torch.rand_like(x) + torch.randn_like(x) + torch.bernoulli(x.sigmoid()))
        + 0 * (aten.uniform(x) + aten.exponential(x))
        + torch.bernoulli(x, p=1.0)
    ),
    "functions that keep zero": lambda x, m: (
        x.sign() + x.round() + x.nan_to_num() + x.expm1() + x.abs().log1p() + x**2 + x**3
    ),
    "gates": lambda x, m: F.logsigmoid(x) + ((x > 0) & (x < 1)) + ((x > 1) | (m[..., None] == 0)),
    "larger and smaller": lambda x, m: torch.maximum(x, -x) * torch.minimum(x, x.cos()) + torch.minimum(x, -x),
    "dropouts off": lambda x, m: F.rrelu(F.alpha_dropout(F.feature_alpha_dropout(x, 0.5, False), 0.5, False)),
    "native dropout off": lambda x, m: torch.native_dropout(x, 0.5, train=False)[0],
}
VIEWS = {
    "flatten tokens": lambda x, m: F.silu(x.view(-1, H)).view(H, H, H),
    "flatten tokens with heads": lambda x, m: F.softmax(x.view(H, H, 2, 2).reshape(-1, 2), -1).reshape(H, H, H),
    "flatten tokens with heads parted on the way": lambda x, m: F.softmax(x.reshape(-1, 2), -1).reshape(H, H, H),
    "flatten tokens with all features": lambda x, m: (x.reshape(-1) * 2).view(H * H, 2, 2).view(-1, 2).view(H, H, H),
    "flatten tokens and features apart": lambda x, m: x.reshape(H * H, 2, 2).sum(-1).view(H, H, 2),
    "heads": lambda x, m: x.view(H, H, 2, 2).transpose(1, 2).softmax(-1).transpose(1, 2).flatten(2),
    "rearrange": lambda x, m: einops.rearrange(
        einops.rearrange(x, "b l (h d) -> b h l d", h=2), "b h l d -> b l (h d)"
    ),
    "channels first": lambda x, m: (x.transpose(1, 2) * 2).transpose(1, 2),
    "permute": lambda x, m: x.permute(2, 1, 0).exp().permute(2, 1, 0),
    "channels first by mT": lambda x, m: (x.mT * 2).mT,
    "time first": lambda x, m: x.transpose(0, 1).contiguous().transpose(0, 1),
    "chunk": lambda x, m: x.chunk(2, -1)[0] * x.chunk(2, -1)[1],
    "split": lambda x, m: torch.cat(x.split([1, 3], dim=2)[::-1], -1),
    "unbind": lambda x, m: torch.stack(x.unbind(-1)[::-1], -1),
    "select": lambda x, m: x * x[:, :, 0].unsqueeze(-1),
    "slice features": lambda x, m: F.pad(x[..., 1:], (1, 0)),
    "narrowed": lambda x, m: x.narrow(-1, 1, 2) * x.narrow(2, 0, 2),
    "slice nothing": lambda x, m: x[:, 0:, :],
    "expand": lambda x, m: x[:, :, None, :].expand(-1, -1, 3, -1).sum(2),
    "expand with sizes": lambda x, m: x[:, :, None, :].expand(H, H, 3, H).mean(2),
    "squeeze": lambda x, m: x.unsqueeze(-1).squeeze(-1),
    "squeeze all": lambda x, m: x.unsqueeze(-1).squeeze(),
    "squeeze several": lambda x, m: x[:, :, None, :, None].squeeze((2, 4)),
    "views by other names": lambda x, m: aten._unsafe_view(x.unflatten(-1, (2, 2)), [H, H, H]),
    "joined by other names": lambda x, m: aten.concat([x, x], -1) + aten.concatenate([x, x], -1),
    "parts": lambda x, m: torch.cat([*x.split(3, -1), *x.tensor_split(2, -1), *aten.split.sizes(x, [1, 3], 2)], -1),
    "expanded as another": lambda x, m: x[..., :1].expand_as(x[..., :1]) * x,
    "axes moved": lambda x, m: (
        (x.swapaxes(1, 2) * 2).swapdims(-1, 1) + x.movedim(2, 0).exp().movedim((0, 2), (2, 1)).movedim(1, -2)
    ),
    "broadcast": lambda x, m: (
        torch.broadcast_tensors(x, x[..., :1], W)[1] + W[None].broadcast_to(H, -1, H) * x[..., :1].broadcast_to(x.shape)
    ),
    "repeated": lambda x, m: x.repeat(1, 1, 2) + x.tile(2) + x.repeat(2, 1, 1, 2).sum(0) + x.repeat_interleave(2, -1),
    "repeat interleave by view": lambda x, m: x[..., None].expand(H, H, H, 2).reshape(H, H, 2 * H),
}


def turned(x):
    """As rotary embeddings turn pairs of features, the pairs being complex numbers."""
    pairs = torch.view_as_complex(x.reshape(H, H, 2, 2))
    by = torch.polar(torch.ones(H, 2), torch.arange(H)[:, None] * torch.tensor([1.0, 0.3]))
    return torch.view_as_real(pairs * by).flatten(2)


VIEWS["pairs as complex numbers"] = lambda x, m: turned(x)


def filled_by_parts(x):
    y = torch.empty(H, H, 3, H, dtype=x.dtype)
    y[:, :, :, :1] = x[:, :, None, :1]
    y[..., 1:] = x[:, :, None, 1:]
    return y.sum(2)


def written_to_a_part(x):
    y = x * 2
    y[..., 0] = x[..., 1]
    y[..., 1::2] += 1
    first = y.transpose(1, 2)[:, 0]
    first.mul_(3)
    y[..., 2].fill_(0.5)
    return y * first[..., None]


INDEXED = {
    "gather": lambda x, m: x.gather(-1, x.argsort(-1)) + x.take_along_dim(x.argsort(-1), 2),
    "features by an index": lambda x, m: x[:, :, [2, 0]] + x.index_select(2, torch.tensor([1, 1])),
    "features by indices": lambda x, m: x.unflatten(-1, (2, 2))[:, :, [[0], [1]], [0, 1]],
    "features of heads by indices apart": lambda x, m: x.view(H, H, 2, 2, 1)[..., [0, 1], :, [0, 0]].movedim(0, 2),
    "a table by an index": lambda x, m: W[x.argmax(-1)] + W[:, m + 1].permute(1, 2, 0),
    "a table by indices": lambda x, m: W[x.argmax(-1), m] + W[m.flatten(), [1]].view(H, H),
    "a table by a token's index and a position's": lambda x, m: W[x.argmax(-1), torch.arange(H)] * x[..., 0],
    "a table by flat tokens": lambda x, m: W.index_select(0, m.flatten()).view(H, H, H) * x,
}
WRITES = {
    "filled by parts": lambda x, m: filled_by_parts(x),
    "written to a part": lambda x, m: written_to_a_part(x),
    "filled like another": lambda x, m: torch.select_scatter(x.new_zeros(H, H, H), x[..., 0], 2, 1) + x,
    "marked by an index": lambda x, m: (
        torch.zeros_like(x).scatter(-1, x.topk(2).indices, 1.0) * x
        + x.scatter(2, x.argsort(-1)[..., :1], x.cos())
        + x.view(-1, H).scatter_add(-1, x.view(-1, H).argsort(-1), x.view(-1, H)).view(H, H, H)
    ),
    "parts put in": lambda x, m: torch.slice_scatter(x, torch.select_scatter(x, x[..., 0], 2, 1)[..., :2], 2, 1, 3),
}
PRODUCTS = {
    "linear": lambda x, m: F.linear(F.linear(x, W), W, W[0]),
    "matmul with a weight": lambda x, m: x @ W,
    "weight times channels first": lambda x, m: (W @ x.transpose(1, 2)).transpose(1, 2),
    "matmul with a vector": lambda x, m: (x @ W[0])[..., None] * x,
    "attention within each token": lambda x, m: (
        F.scaled_dot_product_attention(W.expand(H, H, -1, -1), x[:, :, None], torch.stack([x, x + 1], 2)[:, :, :1])
        + F.scaled_dot_product_attention(*[torch.stack([x, x + 1, -x], 2)] * 3, scale=0.5).mean(2, keepdim=True)
        + F.scaled_dot_product_attention(*[x.view(-1, 1, 2, 2).double()] * 3).float().view(H, H, 1, H)
    ).sum(2),
    "per token product": lambda x, m: (x.unsqueeze(-1) @ x.unsqueeze(-2)).sum(-1),
    "a weight for every head": lambda x, m: (
        (torch.stack([x, x + 1], 1) @ torch.stack([W, W.T])).sum(1)
        + torch.baddbmm(W[:2, None], x.view(1, H * H, H).expand(2, -1, -1), torch.stack([W, W.T])).sum(0).view(H, H, H)
    ),
    "a weight written out for every token": lambda x, m: (
        (W[0].expand(H, H, 1, H) @ x[:, :, :, None]).flatten(2) + (x[:, :, None] @ W.expand(1, H, H, H)).flatten(2)
    ),
    "mm on flat tokens": lambda x, m: torch.mm(x.view(-1, H), W).view(H, H, H),
    "addmm on flat tokens": lambda x, m: torch.addmm(W[0], x.view(-1, H), W).view(H, H, H),
    "batched product": lambda x, m: (
        torch.bmm(x.unsqueeze(-1).flatten(0, 1), x.unsqueeze(-2).flatten(0, 1)).view(H, H, H, H).sum(-1)
    ),
    "einsum with a weight": lambda x, m: torch.einsum("bld,de->ble", x, W),
    "einsum with an ellipsis": lambda x, m: (
        torch.einsum("...d,de->...e", x, W)
        + torch.einsum("b...d,...d->b...d", x, W[0])
        + torch.einsum("bld,de", x, W).mT
        + torch.einsum("i...ld,d->i...l", x, W[0])[..., None]
        + torch.einsum("...d, d", x, W[0])[..., None]
    ),
    "tensordot": lambda x, m: (
        torch.tensordot(x, W, 1) + torch.tensordot(W, x, ([1], [2])).permute(1, 2, 0) + torch.inner(x, W)
    ),
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
    "one hot": lambda x, m: F.one_hot(x.argmax(-1), H).float(),
    "embedding": lambda x, m: F.embedding(x.argmax(-1), W),
    "logsumexp": lambda x, m: x.logsumexp(-1),
    "extremes": lambda x, m: x.amax(-1) + x.amin(-1) + x.max(-1).values + x.min(-1).values + x.argmin(-1),
    "truths": lambda x, m: (x > 0).all(-1).float() + (x > 0).any(-1),
    "spreads": lambda x, m: (
        x.std(-1) + aten.std.dim(x, [-1]) + aten.var.dim(x, [-1]) + torch.var_mean(x, -1)[1] + spread_by_correction(x)
    ),
    "running": lambda x, m: x.cumprod(-1) + x.logcumsumexp(-1) + x.prod(-1, keepdim=True),
    "orders": lambda x, m: x.sort(-1).values + x.sort(dim=-1, stable=True).values + x.argsort(dim=-1, stable=True),
    "rearranged features": lambda x, m: F.glu(aten.constant_pad_nd(x.flip(-1).roll(1, -1), [0, 2]), -1),
    "log softmax": lambda x, m: x.log_softmax(-1) + aten._log_softmax(x, -1, False) + aten._softmax(x, -1, False),
    "norms by other names": lambda x, m: (
        torch.native_layer_norm(x, (H,), W[0], W[1], 1e-5)[0] / aten.norm(x, 2, [-1], True)
    ),
    "masked sums": lambda x, m: (
        x * ((x * m[..., None]).sum() + (x * m[..., None]).mean() + (x * m[..., None]).mean((0, 1, 2)))
    ),
    "masked mean of flattened tokens": lambda x, m: x * (x * m[..., None]).flatten(0, 1).mean(),
    "losses of every token": lambda x, m: (
        F.cross_entropy(x.view(-1, H), m.flatten(), reduction="none").view(H, H)
        + aten.nll_loss_nd(x.transpose(1, 2), m, None, 0, -100)
        + aten.nll_loss(x.view(-1, H), m.flatten(), None, 0, -100).view(H, H)
    ),
}
SNIPPETS = {**POINTWISE, **VIEWS, **INDEXED, **WRITES, **PRODUCTS, **REDUCTIONS}
