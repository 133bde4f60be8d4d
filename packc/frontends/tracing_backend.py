"""Which backend is Dynamo tracing for? A substitution in Dynamo holds for the whole process, packc's for packc only.

A backend is packc's when it, or the backend it wraps, carries ``__packc_backend__ = True``. A backend of your own that
hands its graph to ``packc.backend`` sets that attribute too, or Dynamo traces the original functions for it.

The only file of the frontends that touches torch's private names.
"""

from collections.abc import Callable
from typing import Any

import torch

from packc.frontends.traced_call import keep_as_input
from packc.import_hook import on_import
from packc.private_torch import private_torch


def packc_is_tracing() -> bool:
    """True while Dynamo traces for packc's backend. Dynamo runs this while it traces and keeps the answer.

    Keeping it is sound without a guard: Dynamo never shares compiled code between two backends.
    """
    with private_torch():
        # Here and not above, for importing Dynamo takes as long as all of packc.
        from torch._dynamo.symbolic_convert import InstructionTranslator

        backend = InstructionTranslator.current_tx().output.compiler_fn
    if not is_packc_backend(backend):
        return False
    keep_as_input("position_ids")
    return True


# When there is a Dynamo, for this would import it.
on_import({"torch._dynamo": lambda _: torch.compiler.assume_constant_result(packc_is_tracing)})


def is_packc_backend(backend: Callable[..., Any] | None) -> bool:
    while backend is not None:
        if getattr(backend, "__packc_backend__", False) is True:
            return True
        backend = _wrapped_backend(backend)
    return False


def _wrapped_backend(backend: Callable[..., Any]) -> Callable[..., Any] | None:
    """The backend one layer further in, or None for a bare one."""
    # DDPOptimizer hands Dynamo a bound method; the wrapped backend is an attribute of the object it is bound to.
    owner = getattr(backend, "__self__", None)
    for holder, name in (
        (backend, "_torchdynamo_orig_backend"),  # Dynamo's debug wrapper, around every backend
        (backend, "compiler_fn"),  # torch.compile's, which holds mode and options
        (owner, "backend_compile_fn"),
        (backend, "func"),  # functools.partial
        (backend, "__wrapped__"),  # functools.wraps
    ):
        inner = getattr(holder, name, None)
        if callable(inner) and inner is not backend:
            return inner
    return None
