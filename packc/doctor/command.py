"""The command ``doctor``: its checks in order, a line as each is found."""

from __future__ import annotations

import argparse
import warnings

from packc.doctor.example import example
from packc.doctor.kernels import kernels
from packc.doctor.libraries import functions
from packc.doctor.machine import compiler, versions

_ABOUT = """\
Looks at what packc finds on this machine, and whether it works: versions, the compiler, the C++ kernels (built now if
they are not, which takes a minute), every op's kernels against its reference, the functions of installed libraries that
stay whole in packc's graphs, and a small model, packed. Exit status 1 if anything fails; what is only noted keeps
nothing from working."""

_CHECKS = {
    "versions": versions,
    "C++ kernels": compiler,
    "kernels against the reference in fp64": kernels,
    "functions of libraries": functions,
    "a small model": example,
}


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("doctor", help="whether packc works on this machine", description=_ABOUT)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    failed = 0
    for title, check in _CHECKS.items():
        print(f"{title}", flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say of kernels and libraries is said here
            for status, what, detail in check():
                failed += status == "fail"
                print(f"  {status:4}  {what}{':' if detail else ''} {detail}".rstrip(), flush=True)
    print(f"{failed} failed" if failed else "all is well")
    return 1 if failed else 0
