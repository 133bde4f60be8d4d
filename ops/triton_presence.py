"""Whether Triton kernels can run here, asked when one is first wanted: nothing imports triton before that.

Triton does not exist everywhere (macOS, Windows), and where it does its import may fail: a driver, or a library that
moved on. packc then runs its other implementations.
"""

import functools
import warnings


@functools.cache
def missing() -> str:
    """Why no Triton kernel can run; empty when they can."""
    try:
        from packc.ops.tritonsrc import launch  # noqa: F401  the root of all kernels
    except Exception as error:
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return ""


@functools.cache
def present_or_warn() -> bool:
    """Whether they can; one warning if not, for a GPU that is kept from its kernels."""
    if reason := missing():
        warnings.warn(f"packc: no Triton kernels, so the slower reference runs on the GPU: {reason}", stacklevel=2)
    return not reason


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    if missing():
        return False
    from packc.ops.tritonsrc import launch

    return launch.interpreted()
