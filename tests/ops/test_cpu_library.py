"""The C++ kernels are compiled once, kept, and missed with one warning."""

import ctypes
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from packc.ops import cpu_library

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'

try:
    cpu_library.find_compiler()
except cpu_library.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def test_a_second_build_takes_the_first_ones_library(source, tmp_path, monkeypatch):
    library = cpu_library.build(source, tmp_path / "cache")
    assert ctypes.CDLL(str(library)).answer() == 42
    built = library.stat()
    assert cpu_library.build(source, tmp_path / "cache") == library
    assert library.stat() == built


def test_a_changed_source_or_header_is_another_library(source, tmp_path):
    first = cpu_library.build(source, tmp_path)
    source.write_text(SOURCE.replace("42", "43"))
    second = cpu_library.build(source, tmp_path)
    (tmp_path / "tile.h").write_text("")
    assert len({first, second, cpu_library.build(source, tmp_path)}) == 3
    assert ctypes.CDLL(str(second)).answer() == 43


def test_builders_at_the_same_time_do_not_disturb_each_other(source, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        libraries = set(pool.map(lambda _: cpu_library.build(source, tmp_path / "cache"), range(2)))
    assert list((tmp_path / "cache").glob("[!.]*")) == list(libraries)


def test_a_broken_source_raises_the_compilers_message_and_leaves_nothing(source, tmp_path):
    source.write_text("int answer() { return unheard_of; }")
    with pytest.raises(cpu_library.BuildError, match="unheard_of"):
        cpu_library.build(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_one_warning_names_every_missing_kernel_and_the_others_load(source, tmp_path, monkeypatch):
    for broken in ("one", "two"):
        (tmp_path / f"{broken}.cpp").write_text("#error out of order")
    monkeypatch.setattr(cpu_library, "SOURCES", tmp_path)
    monkeypatch.setenv("PACKC_CACHE_DIR", str(tmp_path / "cache"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        failures = cpu_library._load_all.__wrapped__()
    assert {name: bool(reason) for name, reason in failures.items()} == {"answer": False, "one": True, "two": True}
    assert [("one" in str(w.message), "two" in str(w.message)) for w in caught] == [(True, False), (False, True)]


def test_without_a_compiler_there_is_one_warning(source, tmp_path, monkeypatch):
    (tmp_path / "other.cpp").write_text(SOURCE)
    monkeypatch.setattr(cpu_library, "SOURCES", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"answer, other.*no C\+\+ compiler: looked for no-such-compiler") as caught:
        failures = cpu_library._load_all.__wrapped__()
    assert len(caught) == 1
    assert all(failures.values())
