"""torch's own checks of every op with states, and its backward: schemas, fakes, strides, autograd, tracing."""

import pytest
import torch
from budget import skip_if
from implementations import opcheck
from mixers import MIXERS, in_dtype
from selective_scan_data import offsets

OPTIONS = {"scale": 0.5, "delta_softplus": True, "activation": "silu"}


def channel_first(x):
    return x.transpose(1, -1).contiguous().transpose(1, -1)


def everything(mixer):
    """Of documents, with states."""
    return mixer.make(1, 66), offsets([0, 65, 1]), torch.randn(3, *mixer.state)


def bare(mixer):
    optional = {name.rstrip("?") for name in mixer.declaration.tensors if name.endswith("?")}
    return {name: x for name, x in mixer.make(2, 18).items() if name not in optional}, None, None


def strided(mixer):
    tensors = mixer.make(1, 66)
    return tensors | {name: channel_first(tensors[name]) for name in mixer.per_token()}, None, None


def low_precision(mixer):
    return in_dtype(mixer, mixer.make(1, 66), torch.bfloat16), offsets([0, 65, 1]), None


def double(mixer):
    return in_dtype(mixer, mixer.make(1, 5), torch.float64), None, torch.randn(1, *mixer.state)


def arguments(mixer, case):
    """The op's, by name, as declared: what its function uses up before is not among them."""
    tensors, cu_seqlens, state = case(mixer)
    if "dt" in tensors:  # the op's own are positive
        tensors["dt"] = tensors["dt"].exp()
    given = {**OPTIONS, **tensors, "cu_seqlens": cu_seqlens, "initial_state": state, "output_final_state": True}
    return {name: given.get(name) for name in mixer.declaration.arguments}


def on_default_device(x):
    return x.to(torch.get_default_device()) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("case", [everything, bare, strided, low_precision, double])
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_opcheck(mixer, kernels, case):
    # What is in fp64 is the reference's, which is plain torch: no layout and no dtype is a case of its own.
    skip_if(case in {"cpu": (double,), "reference": (bare, strided, low_precision)}.get(kernels, ()))
    declaration = mixer.declaration
    given = {name: on_default_device(x) for name, x in arguments(mixer, case).items()}
    op, backward = (getattr(torch.ops.packc, f"{declaration.name}{suffix}").default for suffix in ("", "_bwd"))
    opcheck(kernels, op, tuple(_leaf(x) for x in given.values()))

    results = dict(zip(declaration.results, op(*given.values()), strict=True))
    grads = {"dout": torch.randn_like(results["out"]), "dfinal_state": results["final_state"]}
    layouts = {f"channel_first_d{name}": False for name in declaration.own_layout}
    there = {**given, **results, **grads, **layouts}
    opcheck(kernels, backward, tuple(there[name] for name in declaration.backward_arguments))


def _leaf(x):
    return x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
