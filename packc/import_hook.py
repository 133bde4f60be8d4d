"""Call back when a module has been imported, whether that was before or will be later."""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def on_import(actions: dict[str, Callable[[ModuleType], None]]) -> None:
    """Run ``actions[name](module)`` now for each module that is there, and at each later import of one of the names.

    Imports nothing itself.
    """
    for name, action in actions.items():
        if (module := sys.modules.get(name)) is not None:
            action(module)
    sys.meta_path.insert(0, _Finder(actions))


class _Finder:
    """Finds nothing of its own: it has the other finders find the module, and asks to hear when it has run.

    It is never removed, so a module that is reloaded, or dropped and imported anew, is heard again. The import of
    anything else costs one look into a dict.
    """

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self.actions = actions

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _call_after_exec(spec.loader, self.actions[name])
                return spec
        return None


def _call_after_exec(loader: Any, action: Callable[[ModuleType], None]) -> None:
    # An attribute of this one loader, which serves this one import: the module keeps the loader it would have had.
    exec_module = loader.exec_module

    def exec_then_call(module: ModuleType) -> None:
        del loader.exec_module
        exec_module(module)
        action(module)

    loader.exec_module = exec_then_call
