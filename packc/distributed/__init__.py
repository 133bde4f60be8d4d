"""One packed stream over many ranks: plans, and what takes part by one."""

from packc.distributed import attention as attention
from packc.distributed import mixers
from packc.distributed import totals as totals
from packc.distributed.chunks import in_chunks
from packc.distributed.context import sequence_parallel
from packc.distributed.lightning import lightning_attn
from packc.distributed.losses import cross_entropy, mean_over_ranks, next_tokens
from packc.distributed.outputs import Cut, cut_of
from packc.distributed.plans import Plan, plan
from packc.distributed.shards import shard, unshard

mixers.declare_all()

__all__ = [
    "Cut",
    "Plan",
    "cross_entropy",
    "cut_of",
    "in_chunks",
    "lightning_attn",
    "mean_over_ranks",
    "next_tokens",
    "plan",
    "sequence_parallel",
    "shard",
    "unshard",
]
