"""What the tests on two ranks have each rank do. In a module of its own, which a spawned process can import."""

import warnings

import pytest
import torch
import torch.distributed as dist
from harness import BOTH, RIGHT, PlainLM, batch_of, tiny_mamba
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from two_ranks import WORLD

import packc
from packc.batches import pack_batches

ROWS = [RIGHT, BOTH]
BUCKET_MB = 0.0005


def outside(model, **how):
    return torch.compile(DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB), backend=packc.backend, **how)


def inside(model, **how):
    return DistributedDataParallel(torch.compile(model, backend=packc.backend, **how), bucket_cap_mb=BUCKET_MB)


def in_place(model, **how):
    model.compile(backend=packc.backend, **how)
    return DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB)


def batches():
    torch.manual_seed(1)
    return [batch_of(rows) for rows in ROWS]


def ddp_gradients(rank, combine, dynamic):
    dist._DEFAULT_FIRST_BUCKET_BYTES = 500
    warnings.filterwarnings("error", message=".*in one piece")
    model = PlainLM()
    how = {"dynamic": dynamic, "options": {"packc.inner": "aot_eager", "packc.strict": True}}
    compiled = combine(model, **how)
    for _ in range(2):  # DDP rebuilds its buckets after the first
        model.zero_grad()
        compiled(*batches()[rank].values())[0].backward()
    return {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}


def weighted_by_tokens(rank):
    """Gradients where each rank's loss is divided by the labels of both, and losses are summed."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = 500
    model = tiny_mamba(layers=1)
    call = outside(model, options={"packc.inner": "aot_eager", "packc.strict": True})
    batch = batches()[rank]
    labels = (batch["labels"][:, 1:] != -100).sum()
    dist.all_reduce(labels)
    (call(**batch, num_items_in_batch=labels).loss * WORLD).backward()
    return {name: p.grad for name, p in model.named_parameters()}


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(hidden), nn.Linear(hidden, hidden)
        self.taps = nn.Parameter(torch.randn(hidden, 4) / 2)

    def forward(self, h, mask):
        return h + self.mlp(packc.ops.causal_conv1d(self.norm(h) * mask[..., None], self.taps, activation="silu"))


class LMOfBlocks(nn.Module):
    def __init__(self, vocab: int = 32, hidden: int = 8) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocab, hidden), nn.Linear(hidden, vocab)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))

    def forward(self, ids, mask, labels):
        h = self.tokens(ids)
        for block in self.blocks:
            h = block(h, mask)
        logits = self.head(h)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


def fsdp_gradients(rank, compile_blocks):
    model = LMOfBlocks()
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    packings = []
    with pytest.MonkeyPatch.context() as patch:

        def noting(sequences):
            packings.extend(pack_batches(sequences))
            return packings[-len(sequences) :]

        patch.setattr(packc.packed_call, "pack_batches", noting)
        how = {"backend": packc.backend, "options": {"packc.inner": "aot_eager"}}
        if compile_blocks:
            for block in model.blocks:
                block.compile(**how)
        compiled = model if compile_blocks else torch.compile(model, **how)
        compiled(*batches()[rank].values())[0].backward()
    assert len(packings) == len(model.blocks)
    assert all(packing.tokens < packing.padded_tokens for packing in packings)
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}
