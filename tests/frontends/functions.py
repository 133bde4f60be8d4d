"""Functions of transformers that packc keeps whole, of those releases that have them."""

import pytest
import transformers
from packaging.version import Version

RELEASE = Version(transformers.__version__)
GROUPS_HEADS = Version("5.23") <= RELEASE
"""Whether delta rules take fewer heads of keys than of values; before, models repeat them."""
GROUPS_BACKWARD = Version("5.23") <= RELEASE
"""Whether the backward of experts grouped on CPU can be traced."""


def transformers_function(family, name):
    return getattr(pytest.importorskip(f"transformers.models.{family}.modeling_{family}"), name)
