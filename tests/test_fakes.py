"""Compiled models run on tensors without values, as estimators of FLOPs and memory call them."""

import contextlib

import pytest
import torch
from harness import RIGHT, PlainLM, batch_of
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import packc


def on_fakes(*, inner: str, dynamic: bool | None, train: bool, symbolic: bool) -> None:
    model, batch = PlainLM(layers=1), batch_of(RIGHT)
    compiled = torch.compile(
        model, backend=packc.backend, dynamic=dynamic, options={"packc.inner": inner, "packc.strict": True}
    )
    with contextlib.nullcontext() if train else torch.no_grad():
        _, expected = compiled(*batch.values())
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv() if symbolic else None)
        with mode:
            loss, logits = compiled(*(mode.from_tensor(x, static_shapes=not symbolic) for x in batch.values()))
            if train:
                loss.backward()
    assert isinstance(logits, FakeTensor)
    assert logits.dtype == expected.dtype
    if symbolic:
        assert logits.ndim == expected.ndim
    else:
        assert logits.shape == expected.shape
        assert logits.stride() == expected.stride()
    assert all(isinstance(p.grad, FakeTensor) for p in model.parameters()) or not train


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("symbolic", [False, True])
def test_runs_on_fakes_without_reading_the_mask(train, symbolic):
    on_fakes(inner="aot_eager", dynamic=None, train=train, symbolic=symbolic)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_generated_code_never_meets_a_fake(inner, dynamic, train):
    on_fakes(inner=inner, dynamic=dynamic, train=train, symbolic=dynamic)
