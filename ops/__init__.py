"""torch.library ops over packed sequences: reference, CPU and (where present) Triton implementations of each."""

from packc.ops.causal_conv1d import causal_conv1d
from packc.ops.gated_delta_rule import gated_delta_rule
from packc.ops.linear_attention import linear_attention
from packc.ops.linear_scan import linear_scan
from packc.ops.pack import pack, packing_index, unpack
from packc.ops.selective_scan import selective_scan
from packc.ops.ssd import ssd
from packc.ops.varlen_attention import varlen_attention

__all__ = [
    "causal_conv1d",
    "gated_delta_rule",
    "linear_attention",
    "linear_scan",
    "pack",
    "packing_index",
    "selective_scan",
    "ssd",
    "unpack",
    "varlen_attention",
]
