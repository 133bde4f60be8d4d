"""A stock hybrid whose documents are cut over processes.

    torchrun --nproc-per-node 4 examples/sequence_parallel.py

Trains a Bamba of transformers (Mamba-2 layers and attention), unmodified, twice: by the first process alone on whole
batches, and by all, of which each has a part of the tokens. Both losses are printed, and must be equal; in the end, how
much a step's tensors take at most, on each rank and on one process. With ``--data 2``, half of the processes have one
batch and half another, as in a job of many nodes. On CPUs the processes talk by gloo.
"""

import argparse
import copy

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import BambaConfig, BambaForCausalLM

VOCABULARY = 64


def bamba(hidden: int, layers: int) -> BambaForCausalLM:
    config = BambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        attn_layer_indices=[layers - 1],
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_n_heads=4,
        mamba_d_head=hidden // 2,
        mamba_d_state=16,
        use_cache=False,
    )
    return BambaForCausalLM(config).train()


def batch(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """Documents that count, each from a number of its own, the first as long as a row, the others shorter."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 4, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    ids = (torch.randint(VOCABULARY, (rows, 1), generator=generator) + torch.arange(length)) % VOCABULARY
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def peak_bytes(step) -> int:
    """Of all that a step allocates, what lives at the same time."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, default=1, help="batches a step, each with its share of the processes")
    parser.add_argument("--rows", type=int, default=2, help="of a batch")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--cuts", default="tokens", help="tokens, or work: of what processes have equally much")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (options.data, size // options.data), mesh_dim_names=("data", "sequence"))
    torch.manual_seed(0)
    alone = bamba(options.hidden_size, options.layers)
    # DDP averages gradients over all processes, whether they have other batches or other tokens of one.
    together = DistributedDataParallel(copy.deepcopy(alone))
    over_ranks = {"packc.sequence": mesh["sequence"], "packc.sequence_cuts": options.cuts}
    compiled = torch.compile(together, backend="packc", options=over_ranks)
    compiled_alone = torch.compile(alone, backend="packc")
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (together, alone)]

    def step_together(batches: list[dict[str, Tensor]]) -> Tensor:
        loss = compiled(**batches[mesh.get_local_rank("data")]).loss
        loss.backward()
        return loss.detach()

    def step_alone(batches: list[dict[str, Tensor]]) -> Tensor:
        losses = [compiled_alone(**each).loss / len(batches) for each in batches]
        torch.stack(losses).sum().backward()
        return losses[0].detach() * len(batches)

    for step in range(1, options.steps + 1):
        batches = [batch(options.rows, options.length, seed=step * options.data + n) for n in range(options.data)]
        losses = [step_together(batches), *([step_alone(batches)] if rank == 0 else [])]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0:
            ours, whole = (loss.item() for loss in losses)
            print(f"step {step:3}  loss on {size} ranks {ours:.5f}  on one {whole:.5f}", flush=True)
            assert abs(ours - whole) < 1e-3 * whole, "losses differ"

    peaks = [torch.zeros(1) for _ in range(size)]
    dist.all_gather(peaks, torch.tensor([peak_bytes(lambda: step_together(batches)) / 2**20]))
    if rank == 0:
        of_ranks = ", ".join(f"{float(each):.0f}" for each in peaks)
        whole = peak_bytes(lambda: step_alone(batches)) / 2**20
        print(f"MiB of a step's tensors, at most: {of_ranks}  on one {whole:.0f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
