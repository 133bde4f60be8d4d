"""A faster ``tl.associative_scan`` for Triton's interpreter, whose own walks single elements in Python.

It combines whole slices in a tree, so it also shows that a combine function is associative, which a GPU relies on.
Checked on triton 3.9; ``tests/ops/test_interpreted_scan.py`` compares it with the interpreter's own.
"""

import numpy as np
from triton.runtime.interpreter import ScanOps


def tree_scan(self: ScanOps, inputs):
    length = inputs[0].handle.data.shape[self.axis]
    values = [x.handle.data for x in inputs]
    types = [x.dtype for x in inputs]

    step = 1
    while step < length:
        # The rows that wrap around are not used: they have all that is before them already.
        behind = [np.roll(x, step, self.axis) for x in values]
        tensors = [self.to_tensor(x, t) for part in (behind, values) for x, t in zip(part, types, strict=True)]
        combined = self.combine_fn.fn(*tensors)
        combined = combined if isinstance(combined, tuple) else (combined,)
        new = (np.arange(length) >= step).reshape([-1 if i == self.axis else 1 for i in range(values[0].ndim)])
        values = [np.where(new, y.handle.data, x) for x, y in zip(values, combined, strict=True)]
        step *= 2
    return [self.to_tensor(x, dtype) for x, dtype in zip(values, types, strict=True)]
