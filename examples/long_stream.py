"""A stream that is longer than memory, in chunks on one machine: ``python examples/long_stream.py``.

The loss and the gradients of a small linear-attention LM on one long document, whole and in ever more chunks, each in
a process of its own. ``packc.distributed.in_chunks`` carries the states along and runs each chunk again in the
backward, so losses and gradients stay what they are, and memory goes down to what one chunk takes beside the model.
``--figure memory.png`` draws it, for which matplotlib is needed.
"""

import argparse
import multiprocessing
import os
import resource

import torch
import torch.nn.functional as F
from lasp_torchrun import LM, LinearAttention, stream

from packc import distributed


def step(tokens: int, chunks: int, hidden: int, layers: int) -> tuple[float, float, float]:
    """The loss, the length of all gradients together, and by how many MB this process has grown at most."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LM(LinearAttention, hidden, layers)
    ids, _ = stream(tokens, seed=1)

    def summed(ids, following, plan):
        return F.cross_entropy(model(ids, plan=plan)[0], following[0], ignore_index=-100, reduction="sum")

    following = ids.roll(-1, 1)
    following[:, -1] = -100
    # What is loaded once, and kept.
    distributed.in_chunks(summed, ids[:, :256], following[:, :256], cu_seqlens=[0, 256], chunk=128).backward()
    model.zero_grad()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Nothing is run again where there is one chunk, whose activations are all there are.
    size = -(-tokens // chunks)
    total = distributed.in_chunks(summed, ids, following, cu_seqlens=[0, tokens], chunk=size, recompute=chunks > 1)
    loss = total / (tokens - 1)
    loss.backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    length = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return loss.item(), length.item(), grown / 1024


def draw(path: str, memory: dict[int, float]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.loglog(list(memory), list(memory.values()), "o-", base=2)
    axes.set(xlabel="chunks", ylabel="memory of a step, MB")
    axes.set_xticks(list(memory), list(memory))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--most", type=int, default=64, help="chunks: 1, 2, 4, ... so many")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--figure", help="an image file")
    options = parser.parse_args()

    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system, and is not kept in heaps
    memory: dict[int, float] = {}
    first = None
    counts = [1 << n for n in range(options.most.bit_length())]
    for chunks in counts:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # of which nothing is left for the next
            arguments = options.tokens, chunks, options.hidden_size, options.layers
            loss, length, memory[chunks] = pool.apply(step, arguments)
        print(f"{chunks:4} chunks  loss {loss:.5f}  gradients {length:.5f}  {memory[chunks]:7.0f} MB", flush=True)
        first = first or (loss, length)
        assert abs(loss - first[0]) < 1e-4 * first[0], "losses differ"
        assert abs(length - first[1]) < 1e-3 * first[1], "gradients differ"
    if options.figure:
        draw(options.figure, memory)


if __name__ == "__main__":
    main()
