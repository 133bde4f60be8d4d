"""``python -m packc doctor`` finds what is wrong, and ``explain`` tells of a model of one's own."""

import pytest
import torch

from packc.cli import main
from packc.doctor import kernels as agreement
from packc.doctor import machine
from packc.ops import cpu_library

TINY = """
from transformers import MambaConfig, MambaForCausalLM

def make():
    return MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=2))

def unbatched():
    return lambda x: x
"""


@pytest.fixture
def doctor(capsys):
    def run():
        return main(["doctor"]), capsys.readouterr().out

    return run


def test_the_doctor_finds_a_working_machine_well(doctor):
    status, text = doctor()
    assert status == 0, text
    assert "ssd on cpu: within" in text
    assert "fail" not in text


def test_a_kernel_that_is_wrong_fails(doctor, monkeypatch):
    right = agreement._results

    def wrong(mixer, inputs):
        results = right(mixer, inputs)
        return results | {"out": results["out"] + (mixer.name == "ssd" and results["out"].dtype == torch.float32)}

    monkeypatch.setattr(agreement, "_results", wrong)
    status, text = doctor()
    assert status == 1
    assert [line.split()[1] for line in text.splitlines() if line.startswith("  fail")] == ["ssd"]


def test_a_kernel_that_does_not_build_fails_with_what_the_compiler_said(monkeypatch, tmp_path):
    (tmp_path / "broken.cpp").write_text("int f() { return")
    monkeypatch.setattr(cpu_library, "SOURCES", tmp_path)
    monkeypatch.setenv("PACKC_CACHE_DIR", str(tmp_path / "cache"))
    *_, found = machine.compiler()
    assert found.status == "fail"
    assert "error: expected" in found.detail


def test_no_compiler_is_noted(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (found,) = machine.compiler()
    assert found.status == "note"
    assert "no-such-compiler" in found.detail


def test_explain_tells_of_a_model_in_a_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(TINY)
    assert main(["explain", f"{tmp_path / 'mine.py'}:make", "--length", "16", "--left"]) == 0
    assert "packed 2 of 2 mixers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.py:unbatched", "vocab_size"),
        ("mine.py:nothing", "nothing"),
        ("none.py:make", "no file"),
        ("json", "names no function"),
    ],
)
def test_what_explain_cannot_make_it_says(tmp_path, capsys, monkeypatch, name, said):
    (tmp_path / "mine.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    assert main(["explain", name]) == 2
    assert said in capsys.readouterr().err
