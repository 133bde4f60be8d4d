"""What pyproject.toml cannot say: passes/ and ops/ are packc.passes and packc.ops, and every package below is found.

The links packc/passes and packc/ops say so to editors and type checkers, which read a clone and not this; nothing is
built through them.
"""

from setuptools import find_packages, setup

FOLDERS = {"packc": "packc", "packc.passes": "passes", "packc.ops": "ops"}

_LINKS = ("passes", "passes.*", "ops", "ops.*")

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{inner}" for inner in find_packages(folder, exclude=_LINKS)))
    ],
)
