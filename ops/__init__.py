"""torch.library ops over packed sequences: reference, CPU and (where present) Triton implementations of each."""

from packc.ops.causal_conv1d import causal_conv1d
from packc.ops.pack import pack, unpack
from packc.ops.selective_scan import selective_scan

__all__ = ["causal_conv1d", "pack", "selective_scan", "unpack"]
