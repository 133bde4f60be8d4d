"""Graph passes: Dynamo graph -> normalised -> with layouts -> packed. Each is a function ``(gm, *, ...) -> gm``."""

from packc.passes.axes import module_path
from packc.passes.layout import layout
from packc.passes.mask import NoMask, check_mask, find_mask
from packc.passes.normalize import fakify, normalize
from packc.passes.pack import Packed, pack
from packc.passes.reasons import Boundary, NotPackable

__all__ = [
    "Boundary",
    "NoMask",
    "NotPackable",
    "Packed",
    "check_mask",
    "fakify",
    "find_mask",
    "layout",
    "module_path",
    "normalize",
    "pack",
]
