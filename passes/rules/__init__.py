"""One rule per ATen op: how the op reads on tokens, or why it does not."""

from packc.passes.rules import attention, linear_algebra, losses, mixers, pointwise, reductions, scatters, views
from packc.passes.rules.registry import RULES, rule_for, zero_rule_for

__all__ = [
    "RULES",
    "attention",
    "linear_algebra",
    "losses",
    "mixers",
    "pointwise",
    "reductions",
    "rule_for",
    "scatters",
    "views",
    "zero_rule_for",
]
