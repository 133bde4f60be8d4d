"""One packed stream over many ranks: plans, and what takes part by one."""

from packc.distributed import mixers
from packc.distributed.plans import Plan, plan

mixers.declare_all()

__all__ = ["Plan", "plan"]
