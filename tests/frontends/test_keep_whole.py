"""What can go wrong with a function of somebody else's: missing, changed, wrapped, substituted before."""

import importlib
import subprocess
import sys
from types import FunctionType, ModuleType

import pytest
import torch
from tiny_models import batch, counts, tiny_model

import packc.frontends
from packc.frontends.keep_whole import captured, keep_whole, not_captured
from packc.import_hook import on_import

packc.frontends.install()


def form(x, scale=1.0, *args, **kwargs):
    """A stand-in for packc's form of the functions below."""
    return NotImplemented if args or kwargs else x.cos()


def module_with(function, name="library.modeling"):
    module = ModuleType(name)
    module.kept = function
    if isinstance(function, FunctionType) and function.__module__ == __name__:
        function.__module__ = name
    return module


def compiled(module, backend, *args):
    return torch.compile(lambda x: module.kept(x, *args), backend=backend, fullgraph=True)(torch.zeros(3))


def called(recorder, name):
    return any(name in target for target in counts(recorder.graphs[-1]))


def test_install_twice_is_once():
    finders = len(sys.meta_path)
    packc.frontends.install()
    assert len(sys.meta_path) == finders


def test_the_mamba_functions_are_reported():
    importlib.import_module("transformers.models.mamba.modeling_mamba")
    for name in ("causal_conv1d_fn", "mamba_selective_scan", "mamba_inner_fn"):
        assert f"transformers.models.mamba.modeling_mamba.{name}" in captured()


def test_an_unknown_argument_goes_to_the_original(packc_backend):
    def kept(x, scale=1.0, more=0):
        return x.sin() * scale + more

    module = module_with(kept)
    keep_whole(module, "kept", form)
    compiled(module, packc_backend)
    assert called(packc_backend, "cos")
    compiled(module, packc_backend, 2.0, 3)
    assert called(packc_backend, "sin")


def test_a_named_parameter_that_a_form_does_not_name_goes_to_the_original(packc_backend):
    def kept(x, scale=1.0, more=None, **ignored):
        return x.sin() * scale

    def takes_all(x, scale=1.0, *args, **kwargs):
        return x.cos()

    module = module_with(kept)
    keep_whole(module, "kept", takes_all)
    for name, expected in (("ignored", "cos"), ("more", "sin")):
        call = torch.compile(lambda x, name=name: module.kept(x, **{name: 2}), backend=packc_backend, fullgraph=True)
        call(torch.zeros(3))
        assert called(packc_backend, expected)


def test_a_function_imported_from_elsewhere_is_left_to_its_own_module():
    def kept(x, scale=1.0):
        return x.sin() * scale

    kept.__module__ = "library.of_origin"
    keep_whole(module_with(kept, "library.importing"), "kept", form)
    assert "library.importing.kept" not in captured() + list(not_captured())


def test_a_keyword_only_default_survives_the_copy(other_backend):
    def kept(x, scale=1.0, *, shift=2.0):
        return x * scale + shift

    module = module_with(kept)
    keep_whole(module, "kept", form)
    assert compiled(module, other_backend).tolist() == [2.0, 2.0, 2.0]


def test_a_later_capture_recompiles_nothing(packc_backend, other_backend):
    def first(x, scale=1.0):
        return x.sin() * scale

    def second(x, scale=1.0):
        return x.tan() * scale

    module = module_with(first)
    keep_whole(module, "kept", form)
    calls = [torch.compile(lambda x: module.kept(x), backend=backend) for backend in (packc_backend, other_backend)]
    for call in calls:
        call(torch.zeros(3))
    keep_whole(module_with(second), "kept", form)
    for call in calls:
        call(torch.zeros(3))
    assert len(packc_backend.graphs) == len(other_backend.graphs) == 1


def test_what_is_no_function_is_reported():
    keep_whole(module_with(7, "library.too_old"), "kept", form)
    assert "no Python function" in not_captured()["library.too_old.kept"]


def test_a_function_with_other_parameters_is_left_alone(packc_backend):
    def kept(x, shift=0.0):
        return x.sin() + shift

    module = module_with(kept, "library.changed")
    keep_whole(module, "kept", form)
    assert "(x, shift=0.0)" in not_captured()["library.changed.kept"]
    compiled(module, packc_backend)
    assert called(packc_backend, "sin")


def test_a_function_that_somebody_substituted_before_is_left_to_them(packc_backend):
    def kept(x, scale=1.0):
        return x.sin() * scale

    @torch.compiler.substitute_in_graph(kept)
    def theirs(x, scale=1.0):
        return x.tan() * scale

    module = module_with(kept, "library.substituted")
    keep_whole(module, "kept", form)
    assert "library.substituted.kept" in not_captured()
    compiled(module, packc_backend)
    assert called(packc_backend, "tan")


def test_a_function_that_became_a_module_is_found_inside(packc_backend, other_backend):
    def kept(x, scale=1.0):
        return x.sin() * scale

    class Func(torch.nn.Module):  # what the `kernels` package makes of a function it decorates
        def forward(self, *args, **kwargs):
            return kept(*args, **kwargs)

    module = module_with(Func())
    keep_whole(module, "kept", form)
    compiled(module, packc_backend)
    assert called(packc_backend, "cos")
    compiled(module, other_backend)
    assert called(other_backend, "sin")


def test_a_reloaded_module_is_captured_anew(tmp_path, monkeypatch):
    (tmp_path / "library_to_reload.py").write_text("answer = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    heard = []
    on_import({"library_to_reload": lambda module: heard.append(module.answer)})
    module = importlib.import_module("library_to_reload")
    assert heard == [1]
    importlib.reload(module)
    assert heard == [1, 1]
    assert "exec_module" not in vars(module.__loader__)
    on_import({"library_to_reload": lambda module: heard.append("there already")})
    assert heard[2:] == ["there already"]
    monkeypatch.delitem(sys.modules, "library_to_reload")


def test_a_module_that_fails_to_import_fails_as_before_and_may_try_again(tmp_path, monkeypatch):
    path = tmp_path / "library_that_fails.py"
    path.write_text("raise RuntimeError('its own fault')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    heard = []
    on_import({"library_that_fails": heard.append})
    with pytest.raises(RuntimeError, match="its own fault"):
        importlib.import_module("library_that_fails")
    assert heard == []
    path.write_text("answer = 'a repaired module'\n")
    importlib.invalidate_caches()
    assert heard == [importlib.import_module("library_that_fails")]
    monkeypatch.delitem(sys.modules, "library_that_fails")


def test_without_transformers_packc_imports_and_compiles():
    script = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch, packc, packc.frontends
packc.frontends.install()
assert packc.frontends.captured() == [] and packc.frontends.not_captured() == {}
x = torch.randn(1, 5, 4)
packc.ops.causal_conv1d(x, torch.randn(4, 3))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_with_a_fused_kernel_training_takes_the_unfused_path_under_packc_only(
    packc_backend, other_backend, monkeypatch
):
    model, inputs = tiny_model("mamba").train(), batch(4)
    inner = sys.modules["transformers.models.mamba.modeling_mamba"].mamba_inner_fn
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__, strict=True))

    def fused(xz, *args, **kwargs):
        return torch.erfinv(xz.transpose(1, 2)[..., : model.config.hidden_size] * 0)

    # As if mamba-ssm were installed: the wrapper of transformers then calls the package's function.
    monkeypatch.setattr(cells["implementation"], "cell_contents", fused)
    if "is_new_implementation" in cells:  # later than transformers 5.15
        monkeypatch.setattr(cells["is_new_implementation"], "cell_contents", True)
    # Dynamo of torch 2.11 takes every trace for that of an export, for which transformers leaves the package aside.
    monkeypatch.setitem(inner.__globals__, "is_torchdynamo_exporting", lambda: False)
    torch.compile(model, backend=packc_backend, fullgraph=True)(**inputs)
    assert not called(packc_backend, "erfinv")
    assert called(packc_backend, "packc.selective_scan")
    torch.compile(model, backend=other_backend, fullgraph=True)(**inputs)
    assert called(other_backend, "erfinv")
