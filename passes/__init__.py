"""Graph passes: Dynamo graph -> normalised ATen -> read on tokens -> packed. :mod:`packc.pipeline` has their order.

Each is a function of a :class:`~packc.passes.graph.Graph` that returns one.
"""

from packc.passes.attention_as_written import attention_as_written
from packc.passes.attention_masks import attention_masks
from packc.passes.causal_convs import causal_convs
from packc.passes.choose import choose
from packc.passes.constants import constants
from packc.passes.cut_late import cut_late
from packc.passes.forms.sharded import Inputs as ShardedInputs
from packc.passes.forms.sharded import ReachInputs
from packc.passes.functional import functional
from packc.passes.graph import Graph, Ranks, module_of
from packc.passes.labels import Labels
from packc.passes.layout import layout
from packc.passes.mask import NoMask, WrongMask, confirm_mask, find_masks, find_rows
from packc.passes.module_names import module_path
from packc.passes.normalize import fakify, normalize
from packc.passes.pack_attention import pack_attention
from packc.passes.reasons import Boundary, NotPackable
from packc.passes.requirements import Requirements, requirements
from packc.passes.row_wise import row_wise, without_marks
from packc.passes.rules.attention import attends_to_others
from packc.passes.sources import argument_path
from packc.passes.split_head import Autocast, Tail, split_head
from packc.passes.split_products import split_products
from packc.passes.streams import index_fakes, with_inputs_of_its_own
from packc.passes.token_major import token_major
from packc.passes.token_shifts import token_shifts
from packc.passes.unpacked import (
    boundaries_of,
    goes_on_from_a_cache,
    has_rows,
    is_step,
    mixers_of,
    told_of_documents,
)
from packc.passes.widen_losses import widen_losses
from packc.passes.write import write
from packc.passes.written_out_attention import written_out_attention
from packc.passes.zeros import zeros

__all__ = [
    "Autocast",
    "Boundary",
    "Graph",
    "Labels",
    "NoMask",
    "NotPackable",
    "Ranks",
    "ReachInputs",
    "Requirements",
    "ShardedInputs",
    "Tail",
    "WrongMask",
    "argument_path",
    "attends_to_others",
    "attention_as_written",
    "attention_masks",
    "boundaries_of",
    "causal_convs",
    "choose",
    "confirm_mask",
    "constants",
    "cut_late",
    "fakify",
    "find_masks",
    "find_rows",
    "functional",
    "goes_on_from_a_cache",
    "has_rows",
    "index_fakes",
    "is_step",
    "layout",
    "mixers_of",
    "module_of",
    "module_path",
    "normalize",
    "pack_attention",
    "requirements",
    "row_wise",
    "split_head",
    "split_products",
    "token_major",
    "token_shifts",
    "told_of_documents",
    "widen_losses",
    "with_inputs_of_its_own",
    "without_marks",
    "write",
    "written_out_attention",
    "zeros",
]
