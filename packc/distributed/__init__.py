"""One packed stream over many ranks: plans, and what takes part by one."""

from packc.distributed import mixers
from packc.distributed.losses import cross_entropy, mean_over_ranks, next_tokens
from packc.distributed.plans import Plan, plan
from packc.distributed.shards import shard, unshard

mixers.declare_all()

__all__ = ["Plan", "cross_entropy", "mean_over_ranks", "next_tokens", "plan", "shard", "unshard"]
