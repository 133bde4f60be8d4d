"""What tests of sequence parallelism have each rank do: in a module that a spawned process can import."""

from __future__ import annotations

import dataclasses
import random
import warnings
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from live_memory import peak_bytes
from mixers import MIXERS, Mixer, in_dtype, only
from selective_scan_data import reproducible_like
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from wire import received_bytes

import packc


class Cut(NamedTuple):
    """A stream, and where it is cut."""

    cu_seqlens: list[int]
    cuts: list[int]

    @property
    def tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def documents(self) -> int:
        return len(self.cu_seqlens) - 1

    def shard(self, rank: int) -> slice:
        return slice(*self.cuts[rank : rank + 2])


def random_cut(size: int, seed: int, tokens: int = 24) -> Cut:
    """Documents and shards of all lengths, 0 among them; some cuts lie where documents end."""
    choose = random.Random(seed)
    tokens = choose.randrange(1, tokens)
    inner = sorted(choose.randrange(tokens + 1) for _ in range(choose.randrange(5)))
    stream = [0, *inner, tokens]
    places = [*range(tokens + 1), *3 * stream]
    return Cut(stream, [0, *sorted(choose.choice(places) for _ in range(size - 1)), tokens])


def inputs_of(mixer: Mixer, cut: Cut, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The same on all ranks: every argument, and initial states."""
    torch.manual_seed(1)
    state = torch.randn(cut.documents, *mixer.state)
    return in_dtype(mixer, mixer.make(1, cut.tokens), dtype), state.to(torch.promote_types(dtype, torch.float32))


def gradients(
    function: Any, mixer: Mixer, inputs: dict[str, Tensor], state: Tensor | None, part: slice, final: bool, **how: Any
) -> dict[str, Tensor]:
    """Of the tokens in ``part``: ``out``, ``final_state``, and ``d<name>`` of all inputs."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in only(mixer, inputs, part).items()}
    if state is not None:
        leaves["initial_state"] = state.detach().clone().requires_grad_()
    results = function(**leaves, **mixer.options, **how, output_final_state=final)
    out, *states = results if final else (results,)
    whole = next(iter(only(mixer, inputs, slice(None)).values())).shape[1]
    grads = [reproducible_like(out.new_empty(1, whole, *out.shape[2:]))[:, part], *map(reproducible_like, states)]
    found = torch.autograd.grad([out, *states], list(leaves.values()), grads)
    results = {"out": out, **dict(zip(["final_state"], states, strict=False))}
    return {name: x.detach() for name, x in results.items()} | {
        f"d{name}": grad for name, grad in zip(leaves, found, strict=True)
    }


def errors(group: Any, mixer: Mixer, cut: Cut, mine: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, float]:
    """Of this rank's results against those of the whole stream; of what is not per token, of the sum over ranks."""
    of_tokens = {"out", *(f"d{name}" for name in mixer.per_token())}
    worst = {}
    for name, want in whole.items():
        got = mine[name]
        if name in of_tokens:
            scale, want = want.abs().max(), want[:, cut.shard(group.rank())]
        else:
            scale, got = want.abs().max(), got.clone()
            dist.all_reduce(got, group=group)
        assert got.shape == want.shape, (name, got.shape, want.shape)
        assert got.dtype == want.dtype, (name, got.dtype, want.dtype)
        worst[name] = float((got.double() - want.double()).abs().max() / scale.clamp(min=1e-30)) if got.numel() else 0.0
    return worst


def worst_errors(
    group: Any, name: str, cuts: list[Cut], exchanges: list[str], dtype: torch.dtype, compiled: str | None = None
) -> dict[str, float]:
    """By what and where, of all cuts, each with and without initial states, final states and their gradients."""
    mixer, worst = MIXERS[name], {}
    function = mixer.function
    if compiled:
        function = torch.compile(mixer.function, backend=compiled, fullgraph=True, dynamic=True)
    for n, cut in enumerate(cuts):
        inputs, state = inputs_of(mixer, cut, dtype)
        state, final = (state if n % 3 else None), n % 2 == 0
        offsets = torch.tensor(cut.cu_seqlens, dtype=torch.int32)
        whole = gradients(mixer.function, mixer, inputs, state, slice(None), final, cu_seqlens=offsets)
        for exchange in exchanges:
            plan = packc.distributed.plan(offsets, group, cut.cuts, exchange=exchange)
            mine = gradients(function, mixer, inputs, state, cut.shard(group.rank()), final, plan=plan)
            for what, error in errors(group, mixer, cut, mine, whole).items():
                key = f"{what} of {cut} by {exchange}"
                worst[key] = max(worst.get(key, 0.0), error)
    return {key: error for key, error in worst.items() if error > 1e-12} or {"all": 0.0}


def graphs(group: Any, name: str, exchange: str, cuts: list[Cut]) -> tuple[list[str], dict[str, float]]:
    """What AOTAutograd makes of a step on each of several cuts, forward and backward; and the worst errors."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    texts = []

    def note(gm, inputs):
        texts.append(gm.print_readable(print_output=False))
        return make_boxed_func(gm.forward)

    mixer = MIXERS[name]
    compiled = torch.compile(
        mixer.function, backend=aot_autograd(fw_compiler=note, bw_compiler=note), fullgraph=True, dynamic=True
    )
    worst = {}
    for cut in cuts:
        inputs, state = inputs_of(mixer, cut, torch.float64)
        plan = packc.distributed.plan(cut.cu_seqlens, group, cut.cuts, exchange=exchange)
        whole = torch.tensor(cut.cu_seqlens, dtype=torch.int32)
        want = gradients(mixer.function, mixer, inputs, state, slice(None), True, cu_seqlens=whole)
        mine = gradients(compiled, mixer, inputs, state, cut.shard(group.rank()), True, plan=plan)
        for what, error in errors(group, mixer, cut, mine, want).items():
            worst[what] = max(worst.get(what, 0), error)
    return texts, worst


def said_of(group: Any, beside: bool) -> list[str]:
    """What is said where a function is compiled that calls a mixer by a plan, and ``beside`` it one that knows none."""

    def function(x, weight, plan):
        out = packc.ops.causal_conv1d(x, weight, plan=plan)
        return packc.ops.causal_conv1d(out, weight) if beside else out

    torch._dynamo.reset()
    plan = packc.distributed.plan([0, 5, 12, 16], group, [0, 8, 16])
    compiled = torch.compile(function, backend="packc", options={"packc.inner": "eager"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            compiled(torch.ones(1, 8, 2), torch.ones(2, 3), plan)
        except packc.NotPacked as refusal:
            return [str(refusal)]
    return [str(each.message) for each in said if "packc" in str(each.message)]


class _Collectives(TorchDispatchMode):
    """Counts those that begin."""

    begun = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.begun += op in (GATHER, BROADCAST)
        return op(*args, **(kwargs or {}))


def collectives(group: Any, name: str, cuts: list[Cut]) -> list[int]:
    """Of a step on each of several cuts."""
    mixer, found = MIXERS[name], []
    for cut in cuts:
        inputs, state = inputs_of(mixer, cut, torch.float32)
        plan = packc.distributed.plan(cut.cu_seqlens, group, cut.cuts, exchange="all_gather")
        with _Collectives() as counted:
            gradients(mixer.function, mixer, inputs, state, cut.shard(group.rank()), True, plan=plan)
        found.append(counted.begun)
    return found


def chain(group: Any, name: str) -> tuple[float, float]:
    """Of one document on all ranks, whose states hardly decay: the worst error, and that of one that hears its
    neighbour alone."""
    mixer, size = MIXERS[name], group.size()
    cut = Cut([0, 8 * size], [8 * rank for rank in range(size + 1)])
    inputs, _ = inputs_of(mixer, cut, torch.float64)
    slow = {"g": -1e-4, "a": 1 - 1e-4, "A": -1e-4}
    inputs |= {name: torch.full_like(inputs[name], value) for name, value in slow.items() if name in inputs}
    if "beta" in inputs:
        inputs["beta"] *= 0.1  # which forgets, too
    whole = torch.tensor(cut.cu_seqlens, dtype=torch.int32)
    want = gradients(mixer.function, mixer, inputs, None, slice(None), False, cu_seqlens=whole)
    worst = []
    plan = packc.distributed.plan(cut.cu_seqlens, group, exchange="ring")
    for each in (plan, dataclasses.replace(plan, exchange="neighbour")):
        mine = gradients(mixer.function, mixer, inputs, None, cut.shard(group.rank()), False, plan=each)
        worst.append(max(errors(group, mixer, cut, mine, want).values()))
    return tuple(worst)


def leaks(group: Any, name: str, exchange: str) -> list[str]:
    """What changes in a document when another one does, or has NaNs, or alone has gradients of its results."""
    mixer, found = MIXERS[name], []
    # Documents end one token before a cut, at it and behind it, two of them in the middle of a rank.
    for cut in (Cut([0, 5, 12, 13, 19], [0, 6, 12, 19]), Cut([0, 1, 7, 12, 19], [0, 6, 13, 19])):
        inputs, state = inputs_of(mixer, cut, torch.float32)
        shard = cut.shard(group.rank())
        tokens = torch.arange(cut.tokens)[shard]
        plan = packc.distributed.plan(cut.cu_seqlens, group, cut.cuts, exchange=exchange)
        of_tokens = ["out", *(f"d{name}" for name in mixer.per_token())]
        before = gradients(mixer.function, mixer, inputs, state, shard, True, plan=plan)
        for n, (start, end) in enumerate(zip(cut.cu_seqlens, cut.cu_seqlens[1:], strict=False)):
            elsewhere = (tokens < start) | (tokens >= end)
            others = torch.arange(cut.documents) != n
            for value in (3.0, float("nan")):
                changed = {name: x.clone() for name, x in inputs.items()}
                for name in mixer.per_token():
                    changed[name][:, start:end] += value
                states = torch.where(others.view(-1, *[1] * (state.ndim - 1)), state, state + value)
                after = gradients(mixer.function, mixer, changed, states, shard, True, plan=plan)
                for what in of_tokens:
                    if not torch.equal(after[what][:, elsewhere], before[what][:, elsewhere]):
                        found.append(f"{what} of {cut} by {value} in document {n}")
                for what in ("final_state", "dinitial_state"):
                    if not torch.equal(after[what][others], before[what][others]):
                        found.append(f"{what} of {cut} by {value} in document {n}")
            leaves = {name: x.clone().requires_grad_() for name, x in only(mixer, inputs, shard).items()}
            out = mixer.function(**leaves, **mixer.options, plan=plan)
            out.backward(torch.where(elsewhere.view(1, -1, *[1] * (out.ndim - 2)), 0, torch.ones_like(out)))
            found += [
                f"d{name} of {cut} from document {n}"
                for name in mixer.per_token()
                if leaves[name].grad[:, elsewhere].count_nonzero()
            ]
    return found


def graph_of(group: Any, name: str, exchange: str, tokens: int) -> torch.fx.Graph:
    """Of an op of so many tokens, forward, a product with 2, and backward."""
    mixer, size = MIXERS[name], group.size()
    plan = packc.distributed.plan([0, tokens], group, exchange=exchange)

    def step(plan_tensors, *leaves):
        # As compiled, of all ranks alike.
        routing = dict(zip(ROUTING, plan_tensors, strict=True))
        local = dataclasses.replace(plan, **routing, enters=True, leaves=True)
        out = mixer.function(**dict(zip(names, leaves, strict=True)), **mixer.options, plan=local)
        marked = out * 2  # where the forward ends
        return torch.autograd.grad(marked, leaves, torch.ones_like(marked))

    with FakeTensorMode() as mode:
        inputs = mixer.make(1, tokens // size)
        names = list(inputs)
        leaves = [x.requires_grad_() for x in inputs.values()]
        routing = [mode.from_tensor(getattr(plan, each)) for each in ROUTING]
        return make_fx(step)(routing, *leaves).graph


def order_of_graph(group: Any, name: str) -> list[str]:
    """The local ops and the ends of the exchange, as they come."""
    nodes = graph_of(group, name, "all_gather", 64).nodes
    return _order(name, [node.target for node in nodes if node.op == "call_function"])


def order_of_step(group: Any, name: str) -> list[str]:
    """The same of an eager step, of one document on all ranks."""
    mixer, cut = MIXERS[name], Cut([0, 8], [0, 4, 8])
    inputs, _ = inputs_of(mixer, cut, torch.float32)
    plan = packc.distributed.plan(cut.cu_seqlens, group, cut.cuts, exchange="all_gather")
    with _Noting() as noted:
        gradients(mixer.function, mixer, inputs, None, cut.shard(group.rank()), False, plan=plan)
    return _order(name, noted.ops)


def _order(name: str, ops: list[Any]) -> list[str]:
    declared = MIXERS[name].declaration.name
    wanted = {f"packc::{declared}{suffix}" for suffix in ("", "_bwd", "_enter", "_leave")}
    wanted |= {f"_c10d_functional::{each}" for each in ("all_gather_into_tensor", "wait_tensor")}
    names = [op.name() for op in ops if isinstance(op, torch._ops.OpOverload)]
    return [each.split("::")[1].removeprefix(declared) for each in names if each in wanted]


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


def traffic_of_graph(group: Any, name: str, exchange: str, tokens: int) -> tuple[int, int, int, int]:
    """Bytes that this rank receives for an op of so many tokens, and collectives one after another, each way."""
    graph, size = graph_of(group, name, exchange, tokens), group.size()
    way = 0
    counts = [[0, 0], [0, 0]]
    for node in graph.nodes:
        if node.target is torch.ops.aten.mul.Tensor and node.args[1] == 2 and isinstance(node.args[1], int):
            way = 1
        if node.target not in (GATHER, BROADCAST):
            continue
        x = node.args[0].meta["val"]
        moved = x.numel() * x.element_size()
        if node.target is GATHER:
            received = moved * (size - 1)
        else:
            pair = packc.distributed.groups.of_name(node.args[2])
            received = moved if pair.size() == 2 and pair.rank() == 1 else 0
        counts[way][0] += received
        counts[way][1] += 1
    return (*counts[0], *counts[1])


def peak(group: Any, name: str, stream: list[int]) -> int:
    """Bytes alive at most in a step on a stream, beside its inputs."""
    mixer = MIXERS[name]
    plan = packc.distributed.plan(stream, group, exchange="all_gather")
    leaves = {name: x.requires_grad_() for name, x in mixer.make(1, plan.tokens.shape[0]).items()}

    def step() -> None:
        out = mixer.function(**leaves, **mixer.options, plan=plan)
        torch.autograd.grad(out, list(leaves.values()), out.detach())

    step()
    return peak_bytes(step)


ROUTING = ("cu_seqlens", "places", "documents", "ranks", "tokens")
GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
BROADCAST = torch.ops._c10d_functional.broadcast.default


def traffic_on_wire(group: Any, exchange: str, tokens: int, heads: int, size: int) -> int:
    """Bytes that came in by this process's sockets during a forward and a backward of linear attention."""
    mixer = MIXERS["linear_attention"]
    plan = packc.distributed.plan([0, tokens], group, exchange=exchange)
    inputs = mixer.make(1, tokens // group.size(), H=heads, G=1, K=size, V=size)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    for _ in range(2):  # connections are made in the first
        dist.barrier(group)
        before = received_bytes()
        mixer.function(**leaves, **mixer.options, plan=plan).sum().backward()
        after = received_bytes()
    dist.barrier(group)
    return after - before


def opcheck(group: Any, name: str) -> None:
    """Of the op that a mixer with a plan calls, with the arguments that it gets."""
    cut = Cut([0, 5, 14, 14, 20], [0, 7, 13, 20])
    plan = packc.distributed.plan(cut.cu_seqlens, group, cut.cuts)
    mixer, calls = MIXERS[name], []
    inputs, state = inputs_of(mixer, cut, torch.float32)

    def note(self: Any, declared: Any, arguments: Any, initial_state: Any, output_final_state: bool) -> Any:
        routing = plan.cu_seqlens, plan.places, plan.documents, plan.ranks
        last = initial_state, output_final_state, plan.size, plan.group, plan.exchange, plan.near, True, True
        calls.append((getattr(torch.ops.packc, f"{declared.name}_sharded").default, (*arguments, *routing, *last)))
        return torch.zeros(0), torch.zeros(plan.documents.shape[1], 0)

    shard = {name: x.requires_grad_() for name, x in only(mixer, inputs, cut.shard(group.rank())).items()}
    with mock.patch.object(type(plan), "_run", note):
        mixer.function(**shard, **mixer.options, initial_state=state, output_final_state=True, plan=plan)
    # The other checks find that torch's own wait_tensor returns its argument, of which its schema does not tell.
    torch.library.opcheck(*calls[0], test_utils="test_aot_dispatch_dynamic")
