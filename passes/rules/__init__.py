"""One rule per ATen op: how the op reads on tokens, or why it does not."""

from packc.passes.rules import (
    attention,
    indexing,
    linear_algebra,
    losses,
    mixers,
    pointwise,
    reductions,
    repeats,
    scatters,
    views,
)
from packc.passes.rules.registry import RULES, rule_for, zero_rule_for

__all__ = [
    "RULES",
    "attention",
    "indexing",
    "linear_algebra",
    "losses",
    "mixers",
    "pointwise",
    "reductions",
    "repeats",
    "rule_for",
    "scatters",
    "views",
    "zero_rule_for",
]
