"""Python's garbage collector while a graph is compiled."""

import contextlib
import gc
from collections.abc import Iterator

_NEVER = 2**31 - 1


@contextlib.contextmanager
def sparing_old_objects() -> Iterator[None]:
    """What has survived is not traversed again and again for garbage, as the growing graphs would have it be.

    What is young is collected as ever. Since Python 3.14, which has no such generation, nothing is changed.
    """
    youngest, young, old = gc.get_threshold()
    gc.set_threshold(youngest, young, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(youngest, young, old)
