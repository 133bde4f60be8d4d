"""Graph passes: Dynamo graph -> normalised ATen -> with layouts -> packed.

Each is a function ``(gm, *, ...) -> gm``.
"""

from packc.passes.functional import functional
from packc.passes.layout import layout
from packc.passes.mask import NoMask, WrongMask, check_mask, confirm_mask, find_masks
from packc.passes.module_names import module_path
from packc.passes.normalize import fakify, normalize
from packc.passes.pack import Packed, pack
from packc.passes.padding import zero_at_padding
from packc.passes.reasons import Boundary, NotPackable
from packc.passes.sources import argument_path
from packc.passes.unpacked import boundaries_of, is_mixer
from packc.passes.widen_losses import widen_losses

__all__ = [
    "Boundary",
    "NoMask",
    "NotPackable",
    "Packed",
    "WrongMask",
    "argument_path",
    "boundaries_of",
    "check_mask",
    "confirm_mask",
    "fakify",
    "find_masks",
    "functional",
    "is_mixer",
    "layout",
    "module_path",
    "normalize",
    "pack",
    "widen_losses",
    "zero_at_padding",
]
