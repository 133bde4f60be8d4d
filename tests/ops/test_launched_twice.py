"""A tuned kernel can be launched twice: a tuner launches it a hundred times on the same memory before it counts."""

import pytest
import torch
import triton
from implementations import implementation
from launches import instead_of_launch, tuned_kernels
from mixers import MIXERS, OTHERS, run
from selective_scan_data import offsets

MIXERS = MIXERS | OTHERS
# Tokens enough for two chunks or segments, of whole tiles, where kernels go on from one to the next; ssd's kernels are
# those of linear_attention.
QUICK = {
    "selective_scan": [68],
    "causal_conv1d": [5],
    "causal_conv1d of channel-first inputs": [5],
    "causal_conv1d of halves": [5],
    "linear_scan": [68],
    "ssd": [68],
    "gated_delta_rule": [5],
    "gated_delta_rule_per_channel": [5],
}
KERNELS = pytest.mark.parametrize("kernels", ["triton", pytest.param("gpu", marks=pytest.mark.gpu)])


def memory(tensor):
    """All of it, whatever part ``tensor`` is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def launch_twice(mixer, lengths, packed=True):
    """The tuned kernels that the mixer launches; each one's memory after one launch must be that after another."""
    kernels, cu_seqlens = [], offsets(lengths) if packed else None

    def twice(launch, kernel, grid, **arguments):
        launch(kernel, grid, **arguments)
        if isinstance(kernel, triton.runtime.Autotuner):
            kernels.append(kernel)
            tensors = {name: memory(x) for name, x in arguments.items() if isinstance(x, torch.Tensor)}
            once = {name: x.clone() for name, x in tensors.items()}
            launch(kernel, grid, **arguments)
            changed = [name for name, x in tensors.items() if not x.equal(once[name])]
            assert not changed, f"{kernel.fn.__name__} launched twice"

    with instead_of_launch(twice):
        run(mixer, mixer.make(1, sum(lengths)), cu_seqlens, torch.randn(len(lengths), *mixer.state))
    return kernels


@KERNELS
def test_every_tuned_kernel_launched_twice_leaves_the_memory_of_one_launch(kernels):
    with implementation(kernels):
        launched = {kernel for op, lengths in QUICK.items() for kernel in launch_twice(MIXERS[op], lengths)}
    assert launched == tuned_kernels()


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize(("lengths", "packed"), [([140], False), ([5, 0, 140, 1], True)], ids=["row", "documents"])
@pytest.mark.parametrize("op", MIXERS)
def test_so_does_every_tuned_kernel_over_more_chunks_and_documents(kernels, op, lengths, packed):
    with implementation(kernels):
        assert launch_twice(MIXERS[op], lengths, packed)
