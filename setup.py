"""What pyproject.toml cannot say: passes/ and ops/ are packc.passes and packc.ops, and every package below is found."""

from setuptools import find_packages, setup

FOLDERS = {"packc": "packc", "packc.passes": "passes", "packc.ops": "ops"}

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{inner}" for inner in find_packages(folder)))
    ],
)
