"""Which functions of model libraries packc keeps whole here, and which not."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from packc import frontends
from packc.doctor.finding import Finding


def functions() -> Iterator[Finding]:
    """Imports the modules that define any."""
    for library in sorted({modules.split(".")[0] for modules in frontends.looked_for()}):
        spec = importlib.util.find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            continue
        failed = [
            why for module in _defining(library, Path(spec.submodule_search_locations[0])) if (why := _import(module))
        ]
        yield from (Finding("note", library, why) for why in failed)
        kept = [name for name in frontends.captured() if name.startswith(f"{library}.")]
        modules = {name.rsplit(".", 1)[0] for name in kept}
        yield Finding("ok", library, f"{len(kept)} functions of {len(modules)} modules stay whole")
    for name, reason in frontends.not_captured().items():
        yield Finding("note", name, f"is traced as it is: {reason}")


def _defining(library: str, folder: Path) -> Iterator[str]:
    """Modules of a library, by their text, that define a function or class that a frontend looks for."""
    for pattern, names in frontends.looked_for().items():
        if pattern.split(".")[0] != library:
            continue
        definition = re.compile(rf"^(?:def|class) (?:{'|'.join(map(re.escape, names))})\b", re.MULTILINE)
        for file in folder.rglob("*.py"):
            module = ".".join((library, *file.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
            if fnmatchcase(module, pattern) and definition.search(file.read_text(errors="replace")):
                yield module


def _import(module: str) -> str | None:
    """Why it cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:  # what a library's modules raise where something of theirs is missing
        return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None
