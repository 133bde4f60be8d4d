"""Every private name of torch that packc imports has one home, and one that moves is named in the error."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

from packc.private_torch import MovedInTorch, private_torch

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {"packc": "packc", "passes": "packc.passes", "ops": "packc.ops"}
# Types of a graph's targets, which torch's own guides to extending it name.
EVERYWHERE = {("torch._ops", "OpOverload")}


def imports():
    """(file, private module of torch, name, whether ``private_torch`` guards it)."""
    for folder in PACKAGES:
        for file in sorted((REPOSITORY / folder).rglob("*.py")):
            tree = ast.parse(file.read_text())
            guarded = {
                inner
                for node in ast.walk(tree)
                if isinstance(node, ast.With) and "private_torch" in ast.unparse(node.items[0])
                for inner in ast.walk(node)
            }
            hints = {
                inner
                for node in ast.walk(tree)
                if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
                for inner in ast.walk(node)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node not in hints and "torch" in (node.module or "").split("."):
                    for alias in node.names:
                        private = any(part.startswith("_") for part in f"{node.module}.{alias.name}".split("."))
                        if private and (node.module, alias.name) not in EVERYWHERE:
                            yield (
                                file,
                                node.module,
                                alias.name,
                                node in guarded,
                                node in tree.body or node.col_offset == 4,
                            )


def test_every_private_name_has_one_home_that_says_when_it_moves():
    homes = {}
    for file, module, name, guarded, _ in imports():
        assert guarded, f"{file}: {module}.{name} is imported outside private_torch()"
        assert homes.setdefault((module, name), file) == file, f"{module}.{name} has a second home in {file}"
    assert homes


@pytest.mark.parametrize(
    ("file", "module", "name"),
    [
        pytest.param(file, module, name, id=f"{module}.{name}")
        for file, module, name, guarded, on_import in imports()
        if guarded and on_import and file.name != "config.py"
    ],
)
def test_a_name_that_moved_is_named(monkeypatch, file, module, name):
    monkeypatch.delattr(importlib.import_module(module), name)
    spec = importlib.util.spec_from_file_location("moved", file)
    with pytest.raises(MovedInTorch, match=rf"(?s){name}.*{module}.*checked on torch 2\.11"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_an_attribute_that_moved_is_named():
    with (
        pytest.raises(MovedInTorch, match="'object' has no attribute|object has no attribute 'tensor_source'"),
        private_torch(),
    ):
        object().tensor_source  # noqa: B018
