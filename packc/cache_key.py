"""What torch's caches must know of packc: they see a graph's code, and neither what its ops promise nor its metadata.

A compiled graph holds shapes and strides that packc's ops promised: without this, a new version of packc could meet a
graph compiled for the old one. Two graphs of one code may differ in what is recomputed in the backward. And what stock
compiled of a graph that packc leaves as it was may overwrite what the forward saved; see donated_buffers.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path

import torch
from torch import fx

from packc import ops, passes

# What a node carries that AOTAutograd obeys; see passes/write.py for what packed nodes carry.
_OBEYED_META = ("recompute", "ac_graph_id", "custom")


def cache_key(gm: fx.GraphModule) -> str:
    """The tag under which ``gm`` is compiled, equal in every process that would compile it alike."""
    digest = hashlib.sha256(_sources().encode())
    for number, node in enumerate(gm.graph.nodes):
        obeyed = {name: node.meta[name] for name in _OBEYED_META if node.meta.get(name)}
        if obeyed:
            digest.update(f"{number}: {obeyed}\n".encode())
    # A documented option of torch.compiler; checked on torch 2.13.
    return f"{torch.compiler.config.cache_key_tag}packc-{digest.hexdigest()[:16]}"


def keyed_by(key: str) -> contextlib.AbstractContextManager[None]:
    """Compile under this key; a backward that is compiled later needs it again."""
    return torch.compiler.config.patch(cache_key_tag=key)  # type: ignore[attr-defined]


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    folders = (Path(__file__).parent, Path(ops.__file__).parent, Path(passes.__file__).parent)
    for source in sorted({file for folder in folders for file in folder.rglob("*.py")}):
        digest.update(source.read_bytes())
    return digest.hexdigest()
