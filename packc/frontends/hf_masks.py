"""The functions of transformers that make attention masks, which every model with attention calls: traced as they are.

Where one is met, packc learns that it is traced for, and a call's boundaries become inputs of the graph
(:mod:`packc.frontends.traced_call`), though a model of attention alone has no other function of packc's.
"""

from collections.abc import Callable
from typing import Any

from packc.frontends.keep_whole import Around, KeptWhole


def _as_it_is(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


_MAKERS = (
    "create_bidirectional_mask",
    "create_bidirectional_sliding_window_mask",
    "create_causal_mask",
    "create_chunked_causal_mask",
    "create_sliding_window_causal_mask",
)
KEPT_WHOLE: KeptWhole = {"transformers.masking_utils": {name: Around(_as_it_is) for name in _MAKERS}}
