"""What packc adds to a call of a compiled graph: ``python benchmarks/overhead.py``.

Both calls run the same graph on the same batch, in turn: packc's, which asks the batch its facts (the one host sync),
makes index and offsets and counts totals; and the graph itself, handed the index that was made before. The overhead is
the difference of their medians, in CPU time of the process; beside it, that of their lower deciles, which other
processes on the same cores disturb less.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from statistics import quantiles
from time import process_time_ns
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import packc
from packc.compiler import compile_graph
from packc.packed_call import PackedCall

SHAPES = [(8, 128), (8, 512), (32, 2048)]


class Small(nn.Module):
    """A next-token model of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.taps, self.head = nn.Embedding(8, 2), nn.Parameter(torch.ones(2, 2)), nn.Linear(2, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        x: Any = self.embed(input_ids)
        x = x if attention_mask is None else x * attention_mask[..., None]
        logits = self.head(packc.ops.causal_conv1d(x, self.taps))
        if labels is None:
            return logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="of each kind")
    parser.add_argument("--inner", default="inductor", help='what compiles the graph: "aot_eager" is quicker to start')
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, medians of {options.calls} calls in turn, microseconds of CPU time")
    print(f"{'rows':>5} {'length':>7}  {'batch':10} {'graph':>8} {'packc':>8} {'overhead':>9} {'decile':>7}")
    for B, L in SHAPES:
        for name, batch in batches(B, L):
            graph, packed = measured(batch, options.inner, options.calls)
            overhead = f"{packed[4] - graph[4]:9.0f} {packed[0] - graph[0]:7.0f}"
            print(f"{B:5} {L:7}  {name:10} {graph[4]:8.0f} {packed[4]:8.0f} {overhead}", flush=True)


def batches(B: int, L: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Without labels, with them, and without padding in rows of four documents each."""
    mask = (torch.arange(L) < torch.linspace(L / 4, L, B)[:, None]).long()
    ids = torch.randint(8, (B, L))
    labels = ids.masked_fill(mask == 0, -100)
    yield "mask", {"input_ids": ids, "attention_mask": mask}
    yield "labels", {"input_ids": ids, "attention_mask": mask, "labels": labels}
    labels = labels.masked_fill(torch.arange(L) % (L // 4) == 0, -100)
    yield "documents", {"input_ids": ids, "labels": labels, "cu_seqlens": torch.arange(0, B * L + 1, L // 4)}


def measured(batch: dict[str, Tensor], inner: str, calls: int) -> tuple[list[float], list[float]]:
    """Deciles of the microseconds of the graph alone, and of packc's call of it."""
    torch._dynamo.reset()
    taken: list[tuple[PackedCall, tuple[Any, ...]]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with packc.config.patch(inner=inner):
            call, _ = compile_graph(gm, inputs)

        def noting(*given: Any) -> Any:
            taken.append((call, given))
            return call(*given)

        return noting

    backend.__packc_backend__ = True
    offsets = batch.pop("cu_seqlens", None)
    within = contextlib.nullcontext() if offsets is None else packc.documents(cu_seqlens=offsets)
    with torch.no_grad(), within:
        torch.compile(Small(), backend=backend)(**batch)
        ((call, inputs),) = taken
        (packing,) = call.last
        whole = [*inputs, packing.index, packing.cu_seqlens]
        times = [(took(call.compiled, whole), took(call, inputs)) for _ in range(calls)]
    graph, packed = ([each / 1e3 for each in quantiles(column, n=10)] for column in zip(*times, strict=True))
    return graph, packed


def took(call: Callable[..., Any], inputs: Any) -> int:
    began = process_time_ns()
    call(*inputs)
    return process_time_ns() - began


if __name__ == "__main__":
    main()
