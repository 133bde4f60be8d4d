"""Keep one Python function whole in the graphs that packc's backend receives."""

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch

from packc.frontends.tracing_backend import packc_is_tracing

log = logging.getLogger(__name__)

PackedForm = Callable[..., Any]
"""Takes a call of the original function and makes it with packc's ops, or returns NotImplemented: the original runs.

Dynamo inlines it, so it is plain code on tensors. It names the original's parameters, in order, and takes ``*args`` for
those a later version of the library may add; a call that gives one of these by its name goes to the original. What it
gets as ``**kwargs`` is what the original takes so.
"""


@dataclass(frozen=True)
class Around:
    """A packed form that calls the original, which it takes before the original's own arguments."""

    form: Callable[..., Any]


@dataclass(frozen=True)
class ByName:
    """A packed form that takes each argument by its name, for packages that reorder theirs and add to them.

    It names those that it knows, all of which the original must have, and takes the others that it is called with as
    ``**others``.
    """

    form: Callable[..., Any]


@dataclass(frozen=True)
class Method:
    """A packed form of a class's method, or property, of this name: the name in the table is the class's."""

    name: str
    form: PackedForm | Around | ByName


KeptWhole = dict[str, dict[str, PackedForm | Around | ByName | Method]]
"""Modules, by name or pattern -> name of their function or class -> the same with packc's ops."""

# Copies of the originals, by attributes: what Dynamo reads off a global it can guard, a bare closure it cannot.
_untouched = SimpleNamespace()

# Name of each function that a frontend met -> None when packc keeps it whole, else why it does not.
_outcomes: dict[str, str | None] = {}


def captured() -> list[str]:
    """The functions met so far that stay whole in packc's graphs, as ``module.function``."""
    return sorted(name for name, reason in _outcomes.items() if reason is None)


def not_captured() -> dict[str, str]:
    """The functions met so far that packc looked for but leaves to Dynamo, with the reason."""
    return {name: reason for name, reason in sorted(_outcomes.items()) if reason is not None}


def keep_whole(module: ModuleType, name: str, packed_form: PackedForm | Around | ByName | Method) -> None:
    """From now on Dynamo traces calls of ``module.name`` through ``packed_form`` when it traces for packc."""
    qualified = f"{module.__name__}.{name}"
    attribute = getattr(module, name)
    if isinstance(attribute, (FunctionType, type)) and attribute.__module__ != module.__name__:
        return  # imported there: it is met in its own module
    original = _python_function(attribute, name)
    if isinstance(packed_form, Method):
        qualified = f"{qualified}.{packed_form.name}"
        original, packed_form = _as_function(attribute, packed_form.name), packed_form.form
    if original is None:
        reason: str | None = "it is no Python function"
    elif not _same_parameters(original, packed_form):
        reason = f"its parameters are not those packc knows: {inspect.signature(original)}"
    else:
        reason = _substitute(original, packed_form)
    _outcomes[qualified] = reason
    if reason is None:
        log.debug("%s stays whole in packc's graphs", qualified)
    else:
        log.info("%s is traced as it is: %s", qualified, reason)


def _python_function(attribute: object, name: str) -> FunctionType | None:
    """The function itself, also where the `kernels` package turned it into a module whose forward closes over it."""
    if isinstance(attribute, FunctionType):
        return attribute
    if isinstance(attribute, torch.nn.Module):
        for cell in getattr(type(attribute).forward, "__closure__", None) or ():
            if isinstance(cell.cell_contents, FunctionType) and cell.cell_contents.__name__ == name:
                return cell.cell_contents
    return None


def _as_function(owner: object, name: str) -> FunctionType | None:
    """The function behind a class's method or property, made to call one: Dynamo substitutes functions alone."""
    attribute = vars(owner).get(name) if isinstance(owner, type) else None
    function = attribute.fget if isinstance(attribute, property) else attribute
    if not isinstance(function, FunctionType):
        return None

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    setattr(owner, name, attribute.getter(method) if isinstance(attribute, property) else method)
    return function


def _same_parameters(original: Callable[..., Any], packed_form: PackedForm | Around | ByName) -> bool:
    known = _named(packed_form)
    if isinstance(packed_form, ByName):
        return set(known) <= set(_named(original))
    return _named(original)[: len(known)] == known


def _named(function: PackedForm | Around | ByName) -> list[str]:
    """The parameters that have names, in order; of a form, those of the original."""
    own = function.form if isinstance(function, (Around, ByName)) else function
    parameters = inspect.signature(own).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return names[1:] if isinstance(function, Around) else names


def _substitute(original: FunctionType, packed_form: PackedForm | Around | ByName) -> str | None:
    """Register the polyfill of ``original``; returns the reason when it could not be."""
    key = f"{original.__name__}_{len(vars(_untouched))}"
    setattr(_untouched, key, _copy(original))
    names, known = _named(original), _named(packed_form)
    around, by_name = isinstance(packed_form, Around), isinstance(packed_form, ByName)
    form = packed_form.form if isinstance(packed_form, (Around, ByName)) else packed_form
    unknown = names[len(known) :] if known and not by_name else []  # a form that names none takes any

    def packed(args: Any, kwargs: Any) -> Any:
        if around:
            return form(getattr(_untouched, key), *args, **kwargs)
        return form(**dict(zip(names, args, strict=False)), **kwargs) if by_name else form(*args, **kwargs)

    def polyfill(*args: Any, **kwargs: Any) -> Any:
        if packc_is_tracing() and all(kwargs.get(name) is None for name in unknown):
            result = packed(args, kwargs)
            if result is not NotImplemented:
                return result
        return getattr(_untouched, key)(*args, **kwargs)

    try:
        # The signatures drift from version to version of a library, and a wildcard takes them all.
        torch.compiler.substitute_in_graph(original, skip_signature_check=True)(polyfill)
    except ValueError as error:  # somebody substituted it before us
        return str(error)
    return None


def _copy(function: FunctionType) -> FunctionType:
    """The same function under another identity: calling the original in its own polyfill would recurse for ever."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    vars(copy).update(vars(function))  # what torch.compiler.disable leaves on one
    return copy
