"""What packages of kernels compute, packc's ops compute in their place: against transformers' torch code."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from functions import transformers_function
from torch.nn import functional as F
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2

import packc.frontends

packc.frontends.install()

STANDINS = Path(__file__).parent / "standins"
B, L, D, N, W, H, G, P = 2, 7, 6, 4, 3, 4, 2, 3


@pytest.fixture(scope="module")
def package():
    """Imports a module of the stand-ins, which leave no trace: transformers looks for these packages too."""
    before = set(sys.modules)
    sys.path.insert(0, str(STANDINS))
    yield importlib.import_module
    sys.path.remove(str(STANDINS))
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("causal_conv1d", "mamba_ssm", "fla"):
            del sys.modules[name]


def compiled(function, backend, *args, **kwargs):
    return torch.compile(lambda: function(*args, **kwargs), backend=backend, fullgraph=True)()


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def randn(*sizes):
    return torch.randn(sizes)


def test_causal_conv1d(package, packc_backend):
    function = package("causal_conv1d").causal_conv1d_fn
    x, weight, bias = randn(B, D, L), randn(D, W), randn(D)
    actual = compiled(function, packc_backend, x, weight, bias, activation="silu")
    assert_close(actual, mamba.causal_conv1d_fn(x, weight, bias, "silu"))
    _, state = compiled(function, packc_backend, x, weight, bias, return_final_states=True)
    assert_close(state, x[..., 1 - W :])
    before = randn(B, D, W - 1)
    actual = compiled(function, packc_backend, x, weight, bias, None, before)
    assert_close(actual, mamba.causal_conv1d_fn(torch.cat([before, x], -1), weight, bias)[..., W - 1 :])


def scan_arguments():
    values = {"u": randn(B, D, L), "delta": randn(B, D, L), "A": -torch.rand(D, N) - 0.1, "B": randn(B, N, L)}
    return values | {"C": randn(B, N, L), "D": randn(D), "z": randn(B, D, L), "delta_bias": randn(D)}


def test_selective_scan(package, packc_backend):
    function, given = package("mamba_ssm.ops.selective_scan_interface").selective_scan_fn, scan_arguments()
    own = {{"u": "hidden_states", "delta": "dt"}.get(name, name): value for name, value in given.items()}
    expected, state = mamba.mamba_selective_scan(**own, delta_softplus=True, return_last_state=True)
    out, last = compiled(function, packc_backend, *given.values(), True, True)
    assert_close((out, last), (expected, state))
    one_group = given | {"B": given["B"][:, None], "C": given["C"][:, None]}
    assert_close(compiled(function, packc_backend, **one_group, delta_softplus=True), expected)


BLOCK = """
class MambaBlock:
    def selective_scan(self, x, delta, A, B, C, D):
        raise NotImplementedError
"""


def test_a_block_of_mambapy(tmp_path, monkeypatch, packc_backend):
    given = {name: value for name, value in scan_arguments().items() if name not in ("z", "delta_bias")}
    expected = mamba.mamba_selective_scan(*given.values()).transpose(1, 2)
    tokens_first = [value.transpose(1, 2) if value.dim() == 3 else value for value in given.values()]
    (tmp_path / "mambapy").mkdir()
    (tmp_path / "mambapy" / "mamba.py").write_text(BLOCK)
    monkeypatch.syspath_prepend(tmp_path)
    block = importlib.import_module("mambapy.mamba").MambaBlock()
    for name in ("mambapy", "mambapy.mamba"):
        del sys.modules[name]  # for good: transformers asks for it
    assert_close(compiled(block.selective_scan, packc_backend, *tokens_first), expected)


def test_groups_of_a_selective_scan_go_to_the_original(package, packc_backend):
    given = scan_arguments()
    given["B"] = given["B"][:, None].expand(-1, 2, -1, -1)
    with pytest.raises(Exception, match="needs a GPU"):
        compiled(package("mamba_ssm.ops.selective_scan_interface").selective_scan_fn, packc_backend, **given)


def test_mamba_inner(package, packc_backend):
    function, rank = package("mamba_ssm.ops.selective_scan_interface").mamba_inner_fn, 2
    xz, conv, conv_bias = randn(B, 2 * D, L), randn(D, 1, W), randn(D)
    project, project_delta, project_out = randn(rank + 2 * N, D), randn(D, rank), randn(5, D)
    A, skip, delta_bias = -torch.rand(D, N) - 0.1, randn(D), randn(D)
    weights = (conv, conv_bias, project, project_delta, project_out, None, A, None, None, skip)
    actual = compiled(function, packc_backend, xz, *weights, delta_bias=delta_bias, delta_softplus=True)
    x, z = xz.chunk(2, 1)
    x = mamba.causal_conv1d_fn(x, conv[:, 0], conv_bias, "silu")
    delta, keys, queries = (project @ x).split([rank, N, N], 1)
    y = mamba.mamba_selective_scan(x, project_delta @ delta, A, keys, queries, skip, z, delta_bias, True)
    assert_close(actual, y.transpose(1, 2) @ project_out.T)


def ssd_arguments():
    values = {"x": randn(B, L, H, P), "dt": randn(B, L, H), "A": -torch.rand(H) - 0.1, "B": randn(B, L, G, N)}
    return values | {"C": randn(B, L, G, N), "chunk_size": 4, "D": randn(H), "dt_bias": randn(H)}


def test_mamba_chunk_scan(package, packc_backend):
    function, given = package("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined, ssd_arguments()
    z, options = randn(B, L, H, P), {"dt_softplus": True, "dt_limit": (0.01, 2.0)}
    actual = compiled(function, packc_backend, **given, **options, z=z)
    own = {"hidden_states" if name == "x" else name: value for name, value in given.items()}
    assert_close(actual, mamba2.mamba2_chunk_scan(**own, **options) * F.silu(z))


@pytest.mark.parametrize("norm_before_gate", [None, True, False])
def test_mamba_split_conv1d_scan(norm_before_gate, package, packc_backend):
    function = package("mamba_ssm.ops.triton.ssd_combined").mamba_split_conv1d_scan_combined
    inner, of_groups = H * P, G * N
    zxbcdt, conv, conv_bias = randn(B, L, 2 * inner + 2 * of_groups + H), randn(inner + 2 * of_groups, W), None
    dt_bias, A, skip, project, weight = randn(H), -torch.rand(H) - 0.1, randn(H), randn(5, inner), randn(inner)
    options = {} if norm_before_gate is None else {"rmsnorm_weight": weight, "norm_before_gate": norm_before_gate}
    options |= {"outproj_weight": project, "headdim": P, "ngroups": G, "activation": "silu"}
    actual = compiled(function, packc_backend, zxbcdt, conv, conv_bias, dt_bias, A, skip, 4, **options)
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * of_groups, H], -1)
    xBC = mamba.causal_conv1d_fn(xBC.transpose(1, 2), conv, conv_bias, "silu").transpose(1, 2)
    x, keys, queries = xBC.split([inner, of_groups, of_groups], -1)
    keys, queries = keys.unflatten(-1, (G, N)), queries.unflatten(-1, (G, N))
    options = {"D": skip, "dt_bias": dt_bias, "dt_softplus": True}
    y = mamba2.mamba2_chunk_scan(x.unflatten(-1, (H, P)), dt, A, keys, queries, 4, **options).flatten(2)
    gated = y * F.silu(z)
    if norm_before_gate is not None:
        normalised = y if norm_before_gate else gated
        normalised = F.rms_norm(normalised.unflatten(-1, (G, inner // G)), (inner // G,), eps=1e-6).flatten(2) * weight
        gated = normalised * F.silu(z) if norm_before_gate else normalised
    assert_close(actual, gated @ project.T)


GATED = "qwen3_next", "torch_chunk_gated_delta_rule"


def delta_rule_arguments(per_channel):
    gates = (B, L, H, N) if per_channel else (B, L, H)
    values = {"q": randn(B, L, H, N), "k": randn(B, L, H, N), "v": randn(B, L, H, P)}
    return values | {"g": F.logsigmoid(randn(*gates)), "beta": torch.rand(B, L, H)}


@pytest.mark.parametrize(
    ("module", "name", "original"),
    [
        ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", ("qwen3_next", "torch_chunk_gated_delta_rule")),
        (
            "fla.ops.gated_delta_rule",
            "fused_recurrent_gated_delta_rule",
            ("qwen3_next", "torch_chunk_gated_delta_rule"),
        ),
        ("fla.ops.kda", "chunk_kda", ("kimi_linear", "chunk_kimi_delta_attention")),
    ],
)
def test_delta_rules(module, name, original, package, packc_backend):
    original = transformers_function(*original)
    given = delta_rule_arguments(per_channel=name == "chunk_kda")
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True, "initial_state": randn(B, H, N, P)}
    actual = compiled(getattr(package(module), name), packc_backend, **given, **options)
    own = {{"q": "query", "k": "key", "v": "value"}.get(key, key): value for key, value in given.items()}
    assert_close(actual, original(**own, **options))
    scaled = compiled(getattr(package(module), name), packc_backend, **given, use_qk_l2norm_in_kernel=True, scale=2.0)
    assert_close(scaled[0], 2 * N**0.5 * original(**own, use_qk_l2norm_in_kernel=True)[0])


def test_gates_that_a_kernel_would_compute_go_to_the_original(package, packc_backend):
    function, given = package("fla.ops.kda").chunk_kda, delta_rule_arguments(per_channel=True)
    with pytest.raises(Exception, match=r"needs a GPU|torch.compiler.disable"):
        compiled(function, packc_backend, **given, use_gate_in_kernel=True)
