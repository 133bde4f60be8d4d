"""Adapters of low rank on fused and quantised layers train as in eager: packed or, with the reason, unpacked."""

import copy
from functools import partial

import pytest
import torch
from harness import LEFT, RIGHT, PlainLM, batch_of
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.pytorch_utils import Conv1D

import packc

PACKC = {"backend": "packc", "options": {"packc.inner": "aot_eager"}}
SIZE = 8


class Adapted(nn.Module):
    """What ``peft`` makes of a layer, with ``lora_alpha`` equal to the rank."""

    def __init__(self, layer: nn.Module, out: int = SIZE) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(SIZE, 2, bias=False), nn.Linear(2, out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.lora_B(self.lora_A(x))


class Fused(nn.Module):
    """A gate and its input by one layer, as GPT-2 has queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Adapted(Conv1D(2 * SIZE, SIZE), 2 * SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.both(x).split(SIZE, dim=-1)
        return gate.sigmoid() * value


def quantised(bits: int) -> nn.Module:
    layers = pytest.importorskip("transformers.integrations.gemma_quant")
    layer = layers.QuantizedLinear(SIZE, SIZE, bias=True, num_bits=bits)
    layer.weight.copy_(torch.randint(0, 100, layer.weight.shape))
    layer.weight_scale.fill_(0.01)
    layer.input_activation_scale.fill_(0.05)
    return Adapted(layer)


def in_int8_by_torchao() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(SIZE, SIZE))
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    return Adapted(layer)


def model_of(make) -> nn.Module:
    torch.manual_seed(0)
    model = PlainLM().requires_grad_(False)
    with torch.no_grad():
        model.mlps = nn.ModuleList(make() for _ in model.mlps)
    return model


def step(model, rows):
    torch.manual_seed(0)
    model.zero_grad()
    loss, _ = model(*batch_of(rows).values())
    loss.backward()
    return [loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


def assert_trains_as_in_eager(model):
    plain = copy.deepcopy(model)
    model.compile(**PACKC)
    for rows in (RIGHT, LEFT):
        got, wanted = step(model, rows), step(plain, rows)
        assert len(got) == len(wanted) == 5
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


LAYERS = {"fused": Fused} | {f"{bits} bits": partial(quantised, bits) for bits in (2, 4, 8)}


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=[] if name == "4 bits" else pytest.mark.slow) for name, make in LAYERS.items()],
)
def test_adapters_train_packed(make):
    before = packc.stats()
    assert_trains_as_in_eager(model_of(make))
    after = packc.stats()
    assert after["steps"] - before["steps"] == 2
    assert after["graphs"]["unpacked"] == before["graphs"]["unpacked"]


def test_weights_that_wrap_tensors_are_left_unpacked_with_the_reason():
    model = PlainLM()
    model.head.weight = nn.Parameter(TwoTensor(*(torch.randn(32, SIZE) for _ in range(2))), requires_grad=False)
    assert "TwoTensor, which wraps tensors" in packc.explain(model)(*batch_of(RIGHT).values()).fallback


def test_adapters_on_weights_of_torchao_train_unpacked():
    model = model_of(in_int8_by_torchao)
    assert "Int8Tensor, which wraps tensors" in packc.explain(model)(*batch_of(RIGHT).values()).fallback
    assert_trains_as_in_eager(model)
