"""docs/versions.md, pyproject.toml, .ci/newest, CHANGELOG.md and packc itself agree on versions."""

import re
import sys

import pytest
from messages import REPOSITORY

import packc
from packc.private_torch import CHECKED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def numbers(version):
    return tuple(map(int, version.split(".")[:2]))


def supported():
    """Name -> (oldest, newest), of the table."""
    text = (REPOSITORY / "docs" / "versions.md").read_text()
    return {name: (low, high) for name, low, high in re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)}


def passed():
    """Name -> all versions that .ci/newest lists."""
    lines = iter((REPOSITORY / ".ci" / "newest").read_text().splitlines())
    names = next(line.split() for line in lines if line.split()[:2] == ["Python", "torch"])
    rows = [line.split() for line in lines if re.fullmatch(r"[\d. ]+", line)]
    return {name: [numbers(row[n]) for row in rows] for n, name in enumerate(names)}


@pytest.mark.parametrize("name", supported())
def test_the_table_says_what_passed(name):
    assert tuple(map(numbers, supported()[name])) == (min(passed()[name]), max(passed()[name]))


def test_the_oldest_are_the_lower_bounds():
    asked = [
        f"Python{PROJECT['requires-python']}",
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["examples"],
    ]
    bounds = dict(re.fullmatch(r"(\w+)>=([\d.]+)", each).groups() for each in asked if ">=" in each)
    assert bounds == {name: low for name, (low, _) in supported().items() if name != "triton"}
    assert not [each for each in asked if re.search("[<=~]=|<", each.split(";")[0].replace(">=", ""))]


def test_an_error_names_the_releases_of_torch():
    assert " to ".join(supported()["torch"]) == CHECKED


def test_this_version_is_in_the_changelog():
    assert PROJECT["version"] == packc.__version__
    headings = re.findall(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert packc.__version__ in headings
