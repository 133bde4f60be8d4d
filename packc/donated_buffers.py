"""A compiled backward never overwrites what the forward saved for it ("donated buffers").

One that does runs once. AOTAutograd leaves the choice to the first backward, but compiles the backward of a packed
graph before there is one, as it does for every graph that saves a size: then it donates. What runs twice in stock,
``backward(retain_graph=True)`` or two losses of one output, must run twice here. It costs nothing that was seen: the
peak of a training step's tensors is the same (benchmarks/train.py's model, with and without padding).
"""

from __future__ import annotations

from packc.compilation import compilation_under_way


def keep_saved_tensors() -> None:
    """Nothing that the graph being compiled saves is donated, or counts as donated when its backward runs.

    To be called after AOTAutograd has split the graph, and before its backward is compiled.
    """
    # Not ``torch._functorch.config.donated_buffer=False``: read again when the
    # backward runs, it would have to hold for the whole process. Emptied in place: AOTAutograd holds the list twice.
    context = compilation_under_way()
    metadata = context.fw_metadata if context is not None else None
    if metadata is not None and metadata.bw_donated_idxs:
        metadata.bw_donated_idxs.clear()
