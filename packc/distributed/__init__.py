"""One packed stream over many ranks: plans, and what takes part by one."""

from packc.distributed import attention as attention
from packc.distributed import mixers
from packc.distributed import totals as totals
from packc.distributed.chunks import in_chunks
from packc.distributed.lightning import lightning_attn
from packc.distributed.losses import cross_entropy, mean_over_ranks, next_tokens
from packc.distributed.plans import Plan, plan
from packc.distributed.shards import shard, unshard

mixers.declare_all()

__all__ = [
    "Plan",
    "cross_entropy",
    "in_chunks",
    "lightning_attn",
    "mean_over_ranks",
    "next_tokens",
    "plan",
    "shard",
    "unshard",
]
