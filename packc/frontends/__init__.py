"""Which Python functions of model libraries stay whole in packc's graphs, and what each becomes: a file per library."""

import functools
from types import ModuleType

from packc.frontends import (
    hf_delta_rule,
    hf_flex_attention,
    hf_indexers,
    hf_loops,
    hf_losses,
    hf_mamba,
    hf_mamba2,
    hf_masks,
    hf_moe,
    hf_short_conv,
    kernel_packages,
)
from packc.frontends.keep_whole import Around, ByName, Method, PackedForm, captured, keep_whole, not_captured
from packc.frontends.traced_call import BOUNDARIES
from packc.import_hook import on_import

__all__ = ["BOUNDARIES", "captured", "install", "looked_for", "not_captured"]

_TABLES = (
    hf_short_conv.KEPT_WHOLE,
    hf_mamba.KEPT_WHOLE,
    hf_mamba2.KEPT_WHOLE,
    hf_delta_rule.KEPT_WHOLE,
    hf_flex_attention.KEPT_WHOLE,
    hf_indexers.KEPT_WHOLE,
    hf_loops.KEPT_WHOLE,
    hf_losses.KEPT_WHOLE,
    hf_masks.KEPT_WHOLE,
    hf_moe.KEPT_WHOLE,
    kernel_packages.KEPT_WHOLE,
)


def looked_for() -> dict[str, list[str]]:
    """Modules, by name or pattern -> the functions and classes of theirs that stay whole where they are found."""
    found: dict[str, list[str]] = {}
    for table in _TABLES:
        for modules, forms in table.items():
            found.setdefault(modules, []).extend(forms)
    return found


@functools.cache
def install() -> None:
    """Keep the functions of every table whole, in the modules that are imported and in those that will be.

    Imports none of these libraries. Eager code and other backends are not affected.
    """
    for table in _TABLES:
        on_import({modules: functools.partial(_keep_functions_whole, forms) for modules, forms in table.items()})


def _keep_functions_whole(forms: dict[str, PackedForm | Around | ByName | Method], module: ModuleType) -> None:
    for name in forms.keys() & vars(module).keys():
        keep_whole(module, name, forms[name])
