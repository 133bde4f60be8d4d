"""packc's backend is told from others through every wrapper that torch puts around a backend."""

import functools

import pytest
import torch
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.eval_frame import get_compiler_fn

import packc
from packc.frontends.tracing_backend import is_packc_backend, packc_is_tracing


def other(gm, example_inputs, **options):
    return gm.forward


def marked(gm, example_inputs, **options):
    return gm.forward


marked.__packc_backend__ = True  # type: ignore[attr-defined]


class TwoLayersDeep:
    def __init__(self, backend):
        self._torchdynamo_orig_backend = functools.partial(backend, options=None)

    def __call__(self, gm, example_inputs):
        return self._torchdynamo_orig_backend(gm, example_inputs)


def wraps(backend):
    @functools.wraps(backend)
    def wrapper(gm, example_inputs):
        return backend(gm, example_inputs)

    return wrapper


WRAPPERS = {
    "bare": lambda backend: backend,
    "dynamo's debug wrapper": get_compiler_fn,
    "torch.compile's": lambda backend: torch._TorchCompileWrapper(backend, None, {"key": 1}, None),
    "both": lambda backend: get_compiler_fn(torch._TorchCompileWrapper(backend, None, None, None)),
    "ddp": lambda backend: (
        DDPOptimizer(bucket_bytes_cap=1 << 30, backend_compile_fn=get_compiler_fn(backend)).compile_fn
    ),
    "partial": lambda backend: functools.partial(backend, options={}),
    "wraps": wraps,
    "two layers": TwoLayersDeep,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_hides_no_backend(wrap):
    assert is_packc_backend(wrap(marked))
    assert not is_packc_backend(wrap(other))


def test_packc_by_object_and_by_name():
    assert is_packc_backend(packc.backend)
    assert is_packc_backend(torch._TorchCompileWrapper(packc.backend, None, {"packc.strict": True}, None))
    assert lookup_backend("packc") is packc.backend


def test_no_backend_is_not_packc():
    assert not is_packc_backend(None)
    assert not is_packc_backend(get_compiler_fn("eager"))


@pytest.mark.parametrize(
    ("backend", "expected"),
    [(marked, 1.0), (functools.partial(marked), 1.0), (other, 0.0), ("eager", 0.0), ("aot_eager", 0.0)],
    ids=["marked", "partial", "other", "eager", "aot_eager"],
)
def test_dynamo_answers_while_it_traces(backend, expected):
    def which(x):
        return x + (1.0 if packc_is_tracing() else 0.0)

    assert torch.compile(which, backend=backend, fullgraph=True)(torch.zeros(())).item() == expected


def test_dynamo_answers_for_torch_compile_options():
    def which(x):
        return x + (1.0 if packc_is_tracing() else 0.0)

    compiled = torch.compile(which, backend=marked, options={"key": 1}, fullgraph=True)
    assert compiled(torch.zeros(())).item() == 1.0
