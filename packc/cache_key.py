"""What torch's caches must know of packc: a compiled graph holds shapes and strides that packc's ops promised.

The graph itself is in the key; how the ops in it behave is not. Without this, a new version of packc could meet a graph
compiled for the old one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path

import torch

from packc import ops


def keyed_by_ops() -> contextlib.AbstractContextManager[None]:
    """Compile under a cache key that changes with the ops' sources."""
    # A documented option of torch.compiler; checked on torch 2.13.
    tag = torch.compiler.config.cache_key_tag
    return torch.compiler.config.patch(cache_key_tag=f"{tag}packc-{_digest()}")  # type: ignore[attr-defined]


@functools.cache
def _digest() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(ops.__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
