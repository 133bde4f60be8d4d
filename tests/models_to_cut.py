"""The models that tests of ``packc.sequence`` cut over ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import PlainLM, shaken, tiny_mamba, tiny_mamba2
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import packc


class MixersLM(nn.Module):
    """Of packc's mixers, an op between them that looks along the sequence and that packc knows nothing of, and a loss
    of all kinds of sums over tokens."""

    def __init__(self, vocab: int = 32, hidden: int = 6) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocab, hidden), nn.Linear(hidden, vocab)
        self.mix, self.taps = nn.Linear(hidden, 5 * hidden), nn.Parameter(torch.randn(hidden, 4) / 2)
        self.A = nn.Parameter(-torch.rand(hidden, 2))
        self.register_buffer("weight", torch.linspace(0.5, 2, vocab))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shown = mask[..., None]
        h = self.tokens(ids) * shown
        h = (h + packc.ops.causal_conv1d(h, self.taps, activation="silu")) * shown
        h = h + h.cumsum(1) / 8
        q, k, v, delta, b = (self.mix(h) * shown).chunk(5, -1)
        h = h + packc.ops.selective_scan(v, delta, self.A, b[..., :2], b[..., 2:4], delta_softplus=True)
        heads = (x.unflatten(-1, (2, 3)) for x in (q, k, v))
        h = (h + packc.ops.linear_attention(*heads).flatten(2)) * shown
        logits = self.head(h)
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = F.cross_entropy(*flat) + F.cross_entropy(*flat, weight=self.weight, label_smoothing=0.1)
        # A sum that goes back to the tokens, whose gradient comes from all ranks.
        scaled = h / (1 + (h * h).sum())
        spread = (scaled * scaled).sum()
        return loss + spread, logits


class Unmasked(PlainLM):
    """All positions are tokens."""

    def forward(self, ids: torch.Tensor, _: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(ids, torch.ones(ids.shape), labels)


class Embedded(MixersLM):
    """Logits of what was embedded before."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shown = mask[..., None] > 0
        h = packc.ops.causal_conv1d(torch.where(shown, x, 0), self.taps, activation="silu")
        q, k, v, delta, b = torch.where(shown, self.mix(h), 0).chunk(5, -1)
        h = h + packc.ops.selective_scan(v, delta, self.A, b[..., :2], b[..., 2:4], delta_softplus=True)
        heads = (x.unflatten(-1, (2, 3)) for x in (q, k, v))
        h = h + packc.ops.linear_attention(*heads).flatten(2)
        return self.head(torch.where(shown, h + attention(torch.where(shown, h, 0), mask), 0))


class Attends(PlainLM):
    """Attention to what came before, to a window of it, and to all tokens; positions are learned."""

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = super().hidden(ids, mask)
        return h + attention(h, mask)


def attention(h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    back = torch.arange(h.shape[1])[:, None] - torch.arange(h.shape[1])
    for visible in (back >= 0, (back >= 0) & (back < 3), torch.ones_like(back, dtype=torch.bool)):
        q = h.unflatten(-1, (2, -1)).transpose(1, 2)
        shown = visible & mask.bool()[:, None, None]
        attended = F.scaled_dot_product_attention(q, q.flip(-1), q.roll(1, -1), attn_mask=shown)
        h = h + attended.transpose(1, 2).flatten(2)
    return h


class AttendsToEvery(PlainLM):
    """Attention to every other token: no form that packs."""

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = super().hidden(ids, mask).unsqueeze(1)
        back = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        shown = (back % 2 == 0) & mask.bool()[:, None, None]
        return F.scaled_dot_product_attention(h, h, h, attn_mask=shown).squeeze(1)


class AttendsInChunks(PlainLM):
    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = super().hidden(ids, mask).unsqueeze(1)
        place = torch.arange(ids.shape[1])
        chunk = ((place - (mask.cumsum(1) == 0).sum(1, keepdim=True)) // 3)[:, None]
        shown = (chunk[..., None] == chunk[:, :, None]) & (place <= place[:, None]) & mask.bool()[:, None, None]
        return F.scaled_dot_product_attention(h, h, h, attn_mask=shown).squeeze(1)


class Drops(PlainLM):
    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().hidden(ids, mask), 0.1)


class Pairs(PlainLM):
    """Two sequences with a mask each, of which the better one is to be the likelier."""

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        labels: torch.Tensor,
        other_ids: torch.Tensor,
        other_mask: torch.Tensor,
        other_labels: torch.Tensor,
    ) -> torch.Tensor:
        one, _ = super().forward(ids, mask, labels)
        other, _ = super().forward(other_ids, other_mask, other_labels)
        return one - F.logsigmoid(other - one)


class Normalizes(PlainLM):
    """By the statistics of a batch."""

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(super().hidden(ids, mask).transpose(1, 2), None, None, training=True).transpose(1, 2)


class Transforms(PlainLM):
    """Along the sequence, by an op that packc has no rule for."""

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft(super().hidden(ids, mask), dim=1).real


class Doubles(PlainLM):
    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return 2 * super().hidden(ids, mask)


class Breaks(PlainLM):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.hidden(ids, mask)
        torch._dynamo.graph_break()
        return self.head(h)


class Pools(Attends):
    """A head for sequences, on the last token of each row."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.hidden(ids, mask)
        logits = self.head(h)[torch.arange(len(ids)), mask.sum(1) - 1]
        return F.cross_entropy(logits, labels[:, 0]), logits


class Checkpoints(Attends):
    """All of it is run again in the backward, with its collectives."""

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().hidden, ids, mask, use_reentrant=False)


class ReturnsState(PlainLM):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) * mask[..., None]
        out, state = packc.ops.causal_conv1d(x, self.taps[0], output_final_state=True)
        return self.head(out), state


def checkpointed() -> nn.Module:
    """Each layer's forward, and its collectives, are run again in the backward."""
    model = tiny_mamba()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def auxiliary() -> nn.Module:
    """Experts, and a loss of how evenly tokens are dealt out to them."""
    model = of_family("mixtral")
    model.config.output_router_logits = True
    model.router_aux_loss_coef = 1.0
    return model


def of_family(name: str) -> nn.Module:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import families

    return shaken(families.build(name, 32, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": PlainLM,
    "unmasked": Unmasked,
    "attends": Attends,
    "pools": Pools,
    "checkpoints": Checkpoints,
    "auxiliary": auxiliary,
    "mixers": MixersLM,
    "mamba": tiny_mamba,
    "checkpointed": checkpointed,
    "mamba2": tiny_mamba2,
}


def model_named(name: str) -> nn.Module:
    """One of MODELS, or a tiny model of a family."""
    return MODELS[name]() if name in MODELS else of_family(name)
