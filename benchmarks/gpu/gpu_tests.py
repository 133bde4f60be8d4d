"""The test suite's own ``gpu`` tests, those first that say most; a line a test."""

from __future__ import annotations

from typing import Any

import pytest
from step import HERE
from telling import parser, tell

FILES = (
    "test_launched_twice.py",
    "test_selective_scan_documents.py",
    "test_causal_conv1d.py",
    "test_mixers.py",
    "test_pack.py",
    "test_varlen_attention.py",
)


class Telling:
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed:
            why = "" if report.passed else str(report.longreprtext).strip().split("\n")[-1][:200]
            tell(report.nodeid, **({} if report.skipped else {"ok": report.passed}), why=why)


def main() -> None:
    args = parser(__doc__).parse_args()
    tests = HERE.parents[1] / "tests" / "ops"
    files = args.only or [str(tests / name) for name in FILES]
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short", f"--rootdir={tests.parents[1]}"]
    pytest.main([*(["--collect-only"] if args.dry else []), *options, *files[: 1 if args.dry else None]], [Telling()])


if __name__ == "__main__":
    main()
