"""torch.library ops over packed sequences: reference, CPU and (where present) Triton implementations of each."""

from packc.ops.pack import pack, unpack

__all__ = ["pack", "unpack"]
