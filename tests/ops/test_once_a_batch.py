"""What kernels make of a batch's documents is made once, and never of other documents."""

import gc
import weakref

import pytest
import torch
from implementations import implementation
from launches import instead_of_launch
from mixers import MIXERS, run
from selective_scan_data import offsets
from torch import nn

import packc
from packc.ops import causal_conv1d, documents, linear_attention

TABLES = ("_document_of_token", "_tabulate")
KERNELS = pytest.mark.parametrize("kernels", ["triton", pytest.param("gpu", marks=pytest.mark.gpu)])


def name_of(kernel):
    return getattr(kernel, "fn", kernel).__name__


def launched(run):
    names = []
    with instead_of_launch(lambda launch, kernel, grid, **arguments: names.append(name_of(kernel))):
        run()
    return names


@pytest.mark.parametrize("op", ["linear_attention", "selective_scan"])
def test_layers_and_their_backwards_share_what_is_made_of_documents(op):
    mixer, cu_seqlens = MIXERS[op], offsets([3, 2])

    def layers():
        for _ in range(2):
            run(mixer, mixer.make(1, 5), cu_seqlens)

    with implementation("triton"):
        assert sum(name in TABLES for name in launched(layers)) == 4
        documents.made_once(cu_seqlens)
        assert sum(name in TABLES for name in launched(layers)) == 1


@KERNELS
@pytest.mark.parametrize("op", ["linear_attention", "causal_conv1d"])
def test_offsets_that_were_written_to_are_looked_at_again(kernels, op):
    mixer = MIXERS[op]
    with implementation(kernels):
        inputs, cu_seqlens = mixer.make(1, 5), documents.made_once(offsets([3, 2]))
        before = run(mixer, inputs, cu_seqlens)["out"]
        cu_seqlens.copy_(offsets([1, 4]))
        after = run(mixer, inputs, cu_seqlens)["out"]
        assert after.equal(run(mixer, inputs, offsets([1, 4]))["out"])
    assert not after.equal(before)


@KERNELS
def test_what_was_made_goes_with_the_offsets(kernels):
    with implementation(kernels):
        cu_seqlens = documents.made_once(offsets([3, 2]))
        q = torch.randn(1, 5, 1, 2)
        linear_attention(q, q, q, cu_seqlens=cu_seqlens)
        (chunks,) = cu_seqlens._packc_made.values()
    gone = weakref.ref(chunks.table)
    del chunks, cu_seqlens
    gc.collect()
    assert gone() is None


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(4, 3) for _ in range(2))

    def forward(self, x, attention_mask):
        for weight in self.weights:
            x = causal_conv1d(x, weight) * attention_mask[..., None]
        return x


def test_a_compiled_model_makes_them_once_a_step():
    compiled = torch.compile(Convolutions(), backend=packc.backend, options={"packc.inner": "aot_eager"})
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def step():
        compiled(x, attention_mask=mask).sum().backward()

    with implementation("triton"):
        for _ in range(2):
            names = launched(step)
            assert names.count("backward") == 2
            assert names.count("_document_of_token") == 1
