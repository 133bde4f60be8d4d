"""Linear attention beyond what all mixers promise: its kinds of decay, its sizes, its numerics."""

import pytest
import torch
import torch.nn.functional as F
from budget import skip_if_interpreted
from implementations import implementation
from mixers import MIXERS, assert_close, exactly, run
from selective_scan_data import offsets, relative_error
from torch.utils.flop_counter import FlopCounterMode

from packc import config
from packc.ops import linear_attention

MIXER = MIXERS["linear_attention"]


def make(B=1, L=70, H=2, G=None, K=8, V=8, g=None):
    q, k, v = torch.randn(B, L, G or H, K), torch.randn(B, L, G or H, K), torch.randn(B, L, H, V)
    return {"q": q, "k": k, "v": v} | ({} if g is None else {"g": g})


def attend(inputs, g):
    """As the definition reads: a matrix of decayed scores."""
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    sums = g.transpose(1, 2).cumsum(-1)
    decays = (sums[..., :, None] - sums[..., None, :]).exp().tril()
    return ((q @ k.mT) * decays @ v * q.shape[-1] ** -0.5).transpose(1, 2)


@pytest.mark.parametrize("decay", ["none", "per head", "per token"])
def test_every_kind_of_decay_is_the_definition(kernels, decay):
    g = {"none": torch.zeros(1, 70, 2), "per head": -torch.rand(2).expand(1, 70, 2), "per token": -torch.rand(1, 70, 2)}
    inputs = make()
    given = {"none": {}, "per head": {"g": g["per head"][0, 0]}, "per token": {"g": g["per token"]}}[decay]
    exact = attend({name: x.double() for name, x in inputs.items()}, g[decay].double())
    assert relative_error(linear_attention(**inputs, **given), exact) < 2e-6
    assert_close(run(MIXER, inputs | given), exactly(MIXER, inputs | given))


@pytest.mark.parametrize(("K", "V"), [(1, 1), (33, 130), (64, 64), (128, 128), (17, 256), (256, 16)])
def test_any_size_of_heads(kernels, K, V):
    if (K, V) not in [(1, 1), (33, 130)]:
        skip_if_interpreted(kernels)
    inputs = make(L=66, H=1, K=K, V=V, g=-torch.rand(1, 66, 1))
    state = torch.randn(2, 1, K, V)
    assert_close(run(MIXER, inputs, offsets([1, 65]), state), exactly(MIXER, inputs, offsets([1, 65]), state))


@pytest.mark.parametrize("size", [{"B": 0}, {"K": 0}, {"V": 0}, {"L": 0}], ids=str)
def test_any_size_may_be_zero(kernels, size):
    inputs = make(**({"B": 4, "L": 66} | size))
    inputs["g"] = -torch.rand(inputs["v"].shape[:3])
    results = run(MIXER, inputs)
    assert not results["out"].any() or "K" not in size
    for name, x in inputs.items():
        assert results[f"d{name}"].shape == x.shape


def test_sizes_that_do_not_fit_raise_below_the_function_too(kernels):
    """A compiled graph may know sizes only when it runs."""
    q, v = torch.randn(1, 64, 1, 5), torch.randn(1, 64, 1, 3)
    for k, g in [(torch.randn(1, 64, 1, 500), None), (q, torch.zeros(1, 63, 1))]:
        with pytest.raises(ValueError, match="linear_attention: . must have shape"):
            torch.ops.packc.linear_attention(q, k, v, g, 1.0, None, None, False)


@pytest.mark.parametrize("kernels", ["cpu", "triton", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_a_document_gives_the_same_bits_among_others_however_many_heads_share_its_keys(kernels):
    torch.manual_seed(0)
    inputs = make(L=24, H=5, G=1, K=4, V=4, g=-torch.rand(1, 24, 5))
    first, dout = {name: x[:, :7] for name, x in inputs.items()}, torch.randn(1, 24, 5, 4)
    with implementation(kernels):
        alone = run(MIXER, first, offsets([7]), dout=dout[:, :7], output_final_state=False)
        among = run(MIXER, inputs, offsets([7, 4, 4, 4, 5]), dout=dout, output_final_state=False)
    assert [name for name, x in alone.items() if not torch.equal(among[name][:, :7], x)] == []


def test_heads_share_queries_and_keys_in_consecutive_groups(kernels):
    inputs = make(L=9, H=4, G=2, g=-torch.rand(1, 9, 4))
    every_head = inputs | {name: inputs[name].repeat_interleave(2, 2) for name in "qk"}
    shared, own = run(MIXER, inputs), run(MIXER, every_head)
    for name in ("dq", "dk"):
        own[name] = own[name].unflatten(2, (2, 2)).sum(3)
    assert_close(shared, own, 2e-6)


@pytest.mark.parametrize("g", [0.0, -1e-7, -1e-3, -1.0, -30.0, -100.0, -1e4, -1e30])
def test_decays_from_none_to_complete(kernels, g):
    inputs = make(L=66, H=1, g=torch.full((1, 66, 1), g))
    assert_close(run(MIXER, inputs), exactly(MIXER, inputs))


@pytest.mark.parametrize("strong", [-50.0, -700.0, -torch.inf])
def test_a_strong_decay_does_not_swamp_the_weak_ones_behind_it(kernels, strong):
    """As differences of sums from the chunk's start it would: 700 has an ulp of 6e-5."""
    g = -torch.rand(1, 60, 1) * 1e-3
    g[:, [5, 30]] = strong
    inputs = make(L=60, H=1, g=g)
    exact = exactly(MIXER, inputs)["out"]
    assert relative_error(run(MIXER, inputs)["out"][:, 31:], exact[:, 31:]) < 1e-6
    assert relative_error(run(MIXER, inputs)["out"][:, 6:30], exact[:, 6:30]) < 1e-6


def test_inputs_may_differ_in_dtype(kernels):
    inputs = make(L=20, g=F.logsigmoid(torch.randn(1, 20, 2)).bfloat16())
    inputs |= {"k": inputs["k"].bfloat16(), "v": inputs["v"].half()}
    dout = torch.randn(1, 20, 2, 8).half()
    results = run(MIXER, inputs, dout=dout)
    assert [results[name].dtype for name in ("out", "dq", "dk", "dg")] == [
        torch.float16,
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]
    exact = exactly(MIXER, inputs, dout=dout)
    for name, x in results.items():
        assert relative_error(x, exact[name]) <= 2 * torch.finfo(x.dtype).eps + 1e-6, name


def test_the_backward_keeps_inputs_and_one_state_a_chunk():
    inputs = {name: x.requires_grad_() for name, x in make(L=640, K=16, V=16, g=-torch.rand(1, 640, 2)).items()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        out = linear_attention(**inputs)
    given = {x.data_ptr() for x in inputs.values()}
    others = [x for pointer, x in kept.items() if pointer not in given]
    assert sum(x.numel() for x in others) <= 640 // 64 * 2 * 16 * 16
    out.sum().backward()


def test_flops_are_those_of_chunks_of_64():
    inputs = {name: x.requires_grad_() for name, x in make(L=10, H=4, G=2, K=5, V=3).items()}
    with FlopCounterMode(display=False) as counter:
        linear_attention(**inputs).sum().backward()
    forward = 64 * (2 * 5 + 4 * 3) + 2 * 4 * 5 * 3
    backward = 64 * (2 * 5 + 4 * (2 * 3 + 2 * 5)) + 4 * 4 * 5 * 3
    assert counter.get_total_flops() == 2 * 10 * (forward + backward)


def test_arguments_that_do_not_fit_raise_with_the_name_and_the_shapes():
    inputs = make(L=6, H=4, G=2, K=5, V=3)
    with pytest.raises(ValueError, match=r"q must be \(B, L, heads, channels\), not \(6, 2, 5\)"):
        linear_attention(**inputs | {"q": inputs["q"][0]})
    with pytest.raises(ValueError, match=r"k must have shape \(1, 6, 2, 5\), not \(1, 6, 2, 4\)"):
        linear_attention(**inputs | {"k": inputs["k"][..., :4]})
    with pytest.raises(ValueError, match="q's 3 heads do not divide v's 4"):
        linear_attention(**inputs | {name: torch.randn(1, 6, 3, 5) for name in "qk"})
    with pytest.raises(ValueError, match=r"g must have shape \(4,\), not \(2,\)"):
        linear_attention(**inputs, g=torch.zeros(2))
    with pytest.raises(ValueError, match=r"g must have shape \(1, 6, 4\), not \(1, 5, 4\)"):
        linear_attention(**inputs, g=torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match=r"initial_state must have shape \(1, 4, 5, 3\), not \(1, 4, 3, 5\)"):
        linear_attention(**inputs, initial_state=torch.zeros(1, 4, 3, 5))
    with pytest.raises(TypeError, match=r"v must be a floating-point tensor, not torch\.int64"):
        linear_attention(**inputs | {"v": inputs["v"].long()})
    with config.patch(kernels="reference"), pytest.raises(TypeError, match="cu_seqlens must be int32 or int64"):
        linear_attention(**inputs, cu_seqlens=torch.tensor([0.0, 6.0]))
