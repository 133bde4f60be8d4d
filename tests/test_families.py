"""docs/families.md says of every family what is measured."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import families  # noqa: E402

TABLE = families.DOCUMENT.read_text()
QUICK = ("mamba2", "granitemoehybrid", "modernbert")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in families.FAMILIES]
)
def test_the_table_says_what_becomes_of_a_family(family):
    assert families.row(family) in TABLE.splitlines()


def test_every_row_is_of_a_family():
    rows = TABLE[TABLE.index(families.BEGIN) : TABLE.index(families.END)].splitlines()[3:]
    assert [row.split("|")[1].strip() for row in rows] == list(families.FAMILIES)


def test_the_readme_knows_the_table():
    assert "docs/families.md" in (ROOT / "README.md").read_text()
