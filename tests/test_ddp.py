"""Models stay packed under DistributedDataParallel, whatever its buckets, and their gradients are reduced in pieces."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import BOTH, RIGHT, PlainLM, batch_of
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import packc
from packc import ddp

OPTIONS = {"packc.inner": "aot_eager", "packc.strict": True}


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 500)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled_outside(model, **how):
    return torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.0005), backend=packc.backend, **how)


def compiled_inside(model, **how):
    return DistributedDataParallel(torch.compile(model, backend=packc.backend, **how), bucket_cap_mb=0.0005)


def compiled_in_place(model, **how):
    model.compile(backend=packc.backend, **how)
    return DistributedDataParallel(model, bucket_cap_mb=0.0005)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("combine", [compiled_outside, compiled_inside, compiled_in_place])
@pytest.mark.parametrize("dynamic", [None, True])
def test_packs_whole_and_cuts_what_it_packed(combine, dynamic):
    setting = torch._dynamo.config.optimize_ddp
    model = PlainLM()
    eager = copy.deepcopy(model)
    counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in one piece")
        compiled = combine(model, dynamic=dynamic, options=OPTIONS)
        for rows in (RIGHT, BOTH):
            batch = batch_of(rows)
            for each in (compiled, eager):
                each.zero_grad()
            loss, expected = compiled(*batch.values())[0], eager(*batch.values())[0]
            loss.backward()
            expected.backward()
            torch.testing.assert_close(loss, expected)
            for got, want in zip(model.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-5)
    assert counters["aot_autograd"]["ok"] > 2
    assert torch._dynamo.config.optimize_ddp is setting


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("optimize", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("option", ["find_unused_parameters", pytest.param("static_graph", marks=pytest.mark.slow)])
def test_what_ddp_adds_behind_the_model_is_no_graph_that_strict_refuses(option, optimize):
    model, batch = PlainLM(), batch_of(BOTH)
    if option == "find_unused_parameters":
        model.unused = torch.nn.Linear(3, 3)
    eager = copy.deepcopy(model)
    with torch._dynamo.config.patch(optimize_ddp=optimize):
        compiled = torch.compile(
            DistributedDataParallel(model, bucket_cap_mb=0.0005, **{option: True}),
            backend=packc.backend,
            options=OPTIONS,
        )
        for _ in range(2):
            for each in (compiled, eager):
                each.zero_grad()
                each(*batch.values())[0].backward()
            for got, want in zip(model.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("one_rank")
def test_other_backends_get_their_pieces():
    pieces = []

    def other(gm, inputs):
        pieces.append(gm)
        return gm

    model = PlainLM()
    torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.0005), backend=other)(*batch_of(RIGHT).values())
    assert len(pieces) > 1


@pytest.mark.usefixtures("one_rank")
def test_an_unknown_optimizer_leaves_the_model_unpacked_and_says_so(monkeypatch):
    from torch._dynamo.backends.distributed import DDPOptimizer

    monkeypatch.setattr(packc.ddp, "_moved", lambda: "it moved")
    monkeypatch.setattr(DDPOptimizer, "compile_fn", DDPOptimizer.compile_fn.__wrapped__)
    model, batch = PlainLM(), batch_of(BOTH).values()
    compiled = compiled_outside(model, options={"packc.inner": "aot_eager"})
    with pytest.warns(UserWarning, match="unpacked: it moved; set torch._dynamo.config.optimize_ddp = False"):
        loss = compiled(*batch)[0]
    torch.testing.assert_close(loss, model(*batch)[0])
    with torch._dynamo.config.patch(optimize_ddp=False):
        torch._dynamo.reset()
        loss = compiled_outside(model, options=OPTIONS)(*batch)[0]  # packs, under strict
    torch.testing.assert_close(loss, model(*batch)[0])


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("whole_compiles", [True, False])
def test_one_piece_where_pieces_fail_and_the_error_where_the_whole_does_too(monkeypatch, whole_compiles):
    calls = []

    def inner(gm, inputs):
        calls.append(len(gm.graph.nodes))
        if whole_compiles and len(calls) > 1:
            return gm
        raise RuntimeError("out of registers")

    monkeypatch.setattr(packc.compiler, "inner_backend", lambda mode, options: inner)
    model, batch = PlainLM(), batch_of(RIGHT).values()
    compiled = compiled_outside(model)
    if whole_compiles:
        with pytest.warns(UserWarning, match="a piece did not compile: RuntimeError.*out of registers"):
            torch.testing.assert_close(compiled(*batch)[0], model(*batch)[0])
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*in one piece")
            with pytest.raises(Exception, match="out of registers"):
                compiled(*batch)
    assert len(calls) == 2


def test_an_optimizer_that_packc_does_not_know_is_left_alone():
    class OfAnotherTorch:
        def compile_fn(self, graph):
            return graph

    before = OfAnotherTorch.compile_fn
    ddp._hand_over_whole_graphs(SimpleNamespace(DDPOptimizer=OfAnotherTorch))
    ddp._hand_over_whole_graphs(SimpleNamespace())
    assert OfAnotherTorch.compile_fn is before
