"""The C++ kernels are compiled once, kept, and missed with one warning."""

import ctypes
import os
import signal
import threading
import time
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


def test_a_warning_for_each_reason_names_the_missing_kernels_and_the_others_load(source, tmp_path, monkeypatch):
    for broken in ("one", "two"):
        (tmp_path / f"{broken}.cpp").write_text("#error out of order")
    monkeypatch.setattr(cpu_library, "SOURCES", tmp_path)
    monkeypatch.setenv("PACKC_CACHE_DIR", str(tmp_path / "cache"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        failures = cpu_library._load_all.__wrapped__()
    assert {name: bool(reason) for name, reason in failures.items()} == {"answer": False, "one": True, "two": True}
    assert [str(w.message).partition(" for ")[2].partition(",")[0] for w in caught] == ["one", "two"]


def compiler_that(does, tmp_path, monkeypatch):
    """A compiler of which packc finds a version, and that does this with the file ``$fresh`` it is to write."""
    script = tmp_path / "compiler"
    find = 'while [ "$1" != -o ]; do shift; done; fresh=$2'
    script.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 1.0 && exit\n{find}\n{does}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def test_a_compiler_that_is_too_old_costs_one_warning_that_says_so(source, tmp_path, monkeypatch):
    compiler_that("echo \"error: unrecognized option '-std=c++20'\" >&2; exit 1", tmp_path, monkeypatch)
    (tmp_path / "other.cpp").write_text(SOURCE)
    monkeypatch.setattr(cpu_library, "SOURCES", tmp_path)
    monkeypatch.setenv("PACKC_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=r"answer, other, which run the slower reference: .*-std=c\+\+20") as caught:
        cpu_library._load_all.__wrapped__()
    assert len(caught) == 1


def left_in(cache):
    return [file.name for file in cache.iterdir() if not file.name.endswith(".lock")]


def test_a_full_disk_leaves_nothing_and_says_so(source, tmp_path, monkeypatch):
    compiler_that("echo half > $fresh; echo 'fatal error: No space left on device' >&2; exit 1", tmp_path, monkeypatch)
    with pytest.raises(cpu_library.BuildError, match="No space left on device"):
        cpu_library.build(source, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_costs_one_warning(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cpu_library, "SOURCES", tmp_path)
    monkeypatch.setenv("PACKC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"no C\+\+ kernel for answer.*Not a directory") as caught:
        cpu_library._load_all.__wrapped__()
    assert len(caught) == 1


def test_an_interrupt_ends_the_compilers_and_leaves_nothing(source, tmp_path, monkeypatch):
    compiler_that("echo half > $fresh; sleep 60", tmp_path, monkeypatch)
    cache = tmp_path / "cache"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it

    def interrupt_once_it_compiles():
        while not list(cache.glob(".answer-building-*/*.so")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_once_it_compiles, daemon=True).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), cpu_library.builders() as pool:
            list(pool.map(cpu_library.build, [source], [cache]))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 30
    assert left_in(cache) == []


def test_what_a_killed_build_left_is_cleared_away_and_never_taken(source, tmp_path):
    abandoned = tmp_path / "cache" / ".answer-building-killed"
    abandoned.mkdir(parents=True)
    (abandoned / "answer.so").write_text("half")
    library = cpu_library.build(source, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == [library.name]
    assert ctypes.CDLL(str(library)).answer() == 42


@pytest.mark.parametrize("what", ["library", "folder"])
@pytest.mark.parametrize("by", ["mode", "owner"])
def test_nothing_is_loaded_that_another_user_could_have_written(source, tmp_path, what, by):
    library = cpu_library.build(source, tmp_path / "cache")
    changed = library if what == "library" else library.parent
    if by == "mode":
        changed.chmod(0o777)
    elif os.getuid() != 0:
        pytest.skip("only root gives files away")
    else:
        os.chown(changed, 12345, -1)
    with pytest.raises(cpu_library.BuildError, match=f"other users may write to {changed}, .*PACKC_CACHE_DIR"):
        cpu_library.build(source, tmp_path / "cache")


def test_a_folder_above_may_be_everybodys_only_where_nobody_can_replace_what_is_anothers(source, tmp_path):
    library = cpu_library.build(source, tmp_path / "cache")
    tmp_path.chmod(0o1777)
    assert cpu_library.build(source, tmp_path / "cache") == library
    tmp_path.chmod(0o777)
    with pytest.raises(cpu_library.BuildError, match=f"other users may write to {tmp_path},"):
        cpu_library.build(source, tmp_path / "cache")


def test_a_library_is_for_its_owner_alone_to_write_whatever_the_umask(source, tmp_path):
    before = os.umask(0)
    try:
        library = cpu_library.build(source, tmp_path / "cache")
    finally:
        os.umask(before)
    assert not (library.stat().st_mode | library.parent.stat().st_mode) & 0o022


def test_without_a_compiler_there_is_one_warning(source, tmp_path, monkeypatch):
    (tmp_path / "other.cpp").write_text(SOURCE)
    monkeypatch.setattr(cpu_library, "SOURCES", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"answer, other.*no C\+\+ compiler: looked for no-such-compiler") as caught:
        failures = cpu_library._load_all.__wrapped__()
    assert len(caught) == 1
    assert all(failures.values())
