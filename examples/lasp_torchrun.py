"""One packed stream over four processes: ``torchrun --nproc-per-node 4 examples/lasp_torchrun.py``.

A linear-attention LM and a stack of Mamba blocks, each trained twice: on the whole stream by the first process alone,
and on shards of it by all, which exchange states in every layer. Both losses are printed, and must be equal. Documents
are cut wherever a shard ends. On CPUs the processes talk by gloo.
"""

import argparse
import copy
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packc
from packc import distributed

VOCABULARY = 64


class LinearAttention(nn.Module):
    """Of TransNormerLLM's kind: one decay per head, from none to fast."""

    def __init__(self, hidden: int, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden // heads)
        self.register_buffer("decay", -torch.linspace(0, 0.5, heads))
        self.heads = heads

    def forward(self, x: Tensor, **documents: object) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in self.qkv(x).chunk(3, -1))
        attended = packc.ops.linear_attention(F.silu(q), F.silu(k), v, self.decay, **documents)
        return self.out(self.norm(attended).flatten(-2))


class Mamba(nn.Module):
    """Mamba-1's mixer: a short convolution and a selective scan."""

    def __init__(self, hidden: int, states: int = 8) -> None:
        super().__init__()
        inner = 2 * hidden
        self.split = inner, states, states
        self.into, self.out = nn.Linear(hidden, 2 * inner, bias=False), nn.Linear(inner, hidden, bias=False)
        self.taps = nn.Parameter(torch.randn(inner, 4) / 2)
        self.of_token = nn.Linear(inner, sum(self.split), bias=False)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.D, self.delta_bias = nn.Parameter(torch.ones(inner)), nn.Parameter(torch.full((inner,), -4.0))

    def forward(self, x: Tensor, **documents: object) -> Tensor:
        u, z = self.into(x).chunk(2, -1)
        u = packc.ops.causal_conv1d(u, self.taps, activation="silu", **documents)
        delta, B, C = self.of_token(u).split(self.split, -1)
        weights = self.D, z, self.delta_bias
        return self.out(
            packc.ops.selective_scan(u, delta, -self.A_log.exp(), B, C, *weights, delta_softplus=True, **documents)
        )


class LM(nn.Module):
    def __init__(self, mixer: type[nn.Module], hidden: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, hidden), nn.Linear(hidden, VOCABULARY)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        self.mixers = nn.ModuleList(mixer(hidden) for _ in range(layers))

    def forward(self, ids: Tensor, **documents: object) -> Tensor:
        h = self.tokens(ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            h = h + mixer(norm(h), **documents)
        return self.head(h)


def stream(tokens: int, seed: int) -> tuple[Tensor, list[int]]:
    """Documents that count, each from a number of its own, with mistakes: ids ``(1, T)``, and where each begins."""
    generator = torch.Generator().manual_seed(seed)
    lengths, documents = [], []
    while sum(lengths) < tokens:
        length = int(torch.randint(1, tokens // 2, (), generator=generator))
        lengths.append(min(length, tokens - sum(lengths)))
        counted = (torch.randint(VOCABULARY, (), generator=generator) + torch.arange(lengths[-1])) % VOCABULARY
        mistakes = torch.rand(lengths[-1], generator=generator) < 0.1
        documents.append(torch.where(mistakes, torch.randint(VOCABULARY, counted.shape, generator=generator), counted))
    return torch.cat(documents)[None], [0, *accumulate(lengths)]


def loss_of_shard(model: nn.Module, ids: Tensor, cu_seqlens: list[int], exchange: str) -> Tensor:
    plan = distributed.plan(cu_seqlens, dist.group.WORLD, exchange=exchange)
    logits = model(distributed.shard(ids, plan), plan=plan)
    return distributed.cross_entropy(logits, distributed.next_tokens(ids, plan), plan)


def loss_of_whole(model: nn.Module, ids: Tensor, cu_seqlens: list[int]) -> Tensor:
    labels = ids.roll(-1, 1)
    labels[:, torch.tensor(cu_seqlens[1:]) - 1] = -100
    return F.cross_entropy(model(ids, cu_seqlens=torch.tensor(cu_seqlens))[0], labels[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of the whole stream")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--exchange", default="auto", help="auto, all_gather, ring or doubling")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    for name, mixer in (("linear attention", LinearAttention), ("Mamba", Mamba)):
        torch.manual_seed(0)
        alone = LM(mixer, options.hidden_size, options.layers)
        # DDP averages gradients over ranks: of the loss below, that makes the gradient of the whole stream.
        together = DistributedDataParallel(copy.deepcopy(alone))
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (together, alone)]
        for step in range(1, options.steps + 1):
            ids, cu_seqlens = stream(options.tokens, seed=step)
            losses = [loss_of_shard(together, ids, cu_seqlens, options.exchange)]
            if rank == 0:
                losses.append(loss_of_whole(alone, ids, cu_seqlens))
            for loss, optimizer in zip(losses, optimizers, strict=False):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if rank == 0:
                shard, whole = (loss.item() for loss in losses)
                print(f"{name:16} step {step:3}  loss on {size} ranks {shard:.5f}  on one {whole:.5f}", flush=True)
                assert abs(shard - whole) < 1e-3 * whole, "losses differ"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
