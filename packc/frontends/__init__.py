"""Which Python functions of model libraries stay whole in packc's graphs, and what each becomes: a file per library."""

import functools
from types import ModuleType

from packc.frontends import hf_mamba, hf_mamba2, hf_moe
from packc.frontends.keep_whole import captured, keep_whole, not_captured
from packc.frontends.traced_call import arguments_of_traced_call
from packc.import_hook import on_import

__all__ = ["arguments_of_traced_call", "captured", "install", "not_captured"]

_TABLES = (hf_mamba.KEPT_WHOLE, hf_mamba2.KEPT_WHOLE, hf_moe.KEPT_WHOLE)


@functools.cache
def install() -> None:
    """Keep the functions of every table whole, in the modules that are imported and in those that will be.

    Imports none of these libraries. Eager code and other backends are not affected.
    """
    on_import({name: _keep_functions_whole for table in _TABLES for name in table})


def _keep_functions_whole(module: ModuleType) -> None:
    for table in _TABLES:
        for name, packed_form in table.get(module.__name__, {}).items():
            keep_whole(module, name, packed_form)
