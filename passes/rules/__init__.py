"""One rule per ATen op: how the op reads on packed operands, or why it does not."""

from packc.passes.rules import linear_algebra, losses, mixers, pointwise, reductions, views
from packc.passes.rules.registry import RULES, NotTokenwise, PackedForm, Placeholder, rule_for

__all__ = [
    "RULES",
    "NotTokenwise",
    "PackedForm",
    "Placeholder",
    "linear_algebra",
    "losses",
    "mixers",
    "pointwise",
    "reductions",
    "rule_for",
    "views",
]
