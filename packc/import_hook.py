"""Call back when a module has been imported, whether that was before or will be later."""

import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


def on_import(actions: dict[str, Action]) -> None:
    """Run ``action(module)`` now for each module that is there, and at each later import, whose name matches.

    The keys are names or patterns (``library.*.part``). Imports nothing itself.
    """
    for name, module in list(sys.modules.items()):
        _run(_matching(name, actions), module)
    _FINDER.actions.append(actions)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def _matching(name: str, actions: dict[str, Action]) -> list[Action]:
    return [action for pattern, action in actions.items() if fnmatchcase(name, pattern)]


def _run(actions: list[Action], module: ModuleType) -> None:
    for action in actions:
        action(module)


class _Finder:
    """Finds nothing of its own: it has the other finders find the module, and asks to hear when it has run.

    It is never removed, so a module that is reloaded, or dropped and imported anew, is heard again. The import of
    anything else costs a comparison a pattern. There is one: two that hear of one module would ask each other for ever.
    """

    def __init__(self) -> None:
        self.actions: list[dict[str, Action]] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = [action for actions in self.actions for action in _matching(name, actions)]
        if not found:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _call_after_exec(spec.loader, found)
                return spec
        return None


_FINDER = _Finder()


def _call_after_exec(loader: Any, actions: list[Action]) -> None:
    # An attribute of this one loader, which serves this one import: the module keeps the loader it would have had.
    exec_module = loader.exec_module

    def exec_then_call(module: ModuleType) -> None:
        del loader.exec_module
        exec_module(module)
        _run(actions, module)

    loader.exec_module = exec_then_call
