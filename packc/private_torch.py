"""packc leans on private parts of PyTorch. Where one has moved, the error says so, and not something deep inside.

Every import of a private name stands in ``with private_torch():``, in the one file that needs it.
"""

import contextlib
from collections.abc import Iterator

import torch

CHECKED = "2.11 to 2.15"
"""Releases of torch on which the tests of the compiler passed; `.ci/newest --help` says with what beside it."""


class MovedInTorch(ImportError):
    """This torch lacks a private name that packc needs, or has it elsewhere. The message says which and where."""


@contextlib.contextmanager
def private_torch() -> Iterator[None]:
    """Around imports and reads of private names of torch, and nothing else."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise MovedInTorch(
            f"packc needs a private part of PyTorch that torch {torch.__version__} has not where it was: {error}. "
            f"packc was checked on torch {CHECKED}"
        ) from error
