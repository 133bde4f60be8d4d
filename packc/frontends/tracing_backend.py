"""Which backend is Dynamo tracing for? A substitution in Dynamo holds for the whole process, packc's for packc only.

A backend is packc's when it, or the backend it wraps, carries ``__packc_backend__ = True``. A backend of your own that
hands its graph to ``packc.backend`` sets that attribute too, or Dynamo traces the original functions for it.

The only file of the frontends that touches torch's private names.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from packc.frontends.traced_call import is_called_with_boundaries, keep_boundaries
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
    keep_boundaries()
    return True


def called_with_boundaries() -> bool:
    """Whether where documents begin is known by the call being traced, whatever the model hands on of it. Dynamo runs
    this while it traces and keeps the answer, which holds as long as the call has these arguments."""
    return is_called_with_boundaries()


def _run_while_tracing(_: ModuleType) -> None:
    for each in (packc_is_tracing, called_with_boundaries):
        torch.compiler.assume_constant_result(each)


# When there is a Dynamo, for this would import it.
on_import({"torch._dynamo": _run_while_tracing})


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
