"""``packc::<name>_sharded``: a mixer on one rank's shard of a packed stream, by what its ``summary`` says of segments.

Forward: the summary of the last segment is sent on; what comes is the initial state of the first segment's document.
Backward: the gradient of the state that enters the first segment, from that segment alone, is sent back; what comes is
the gradient of the final state of the last segment's document. With these two, the op and its ``_bwd`` op give exactly
the shard of what they give for the whole stream. (LASP, https://arxiv.org/abs/2404.02882, section 3, for any recurrence
that is affine in its state, and for documents.)

Where the mixer says what a state that comes late adds (``packc.ops.summary.Late``), neither op waits: they run while
the first collective is on its way, and ``_enter`` and ``_leave`` do the rest. Nor does any op wait on a rank that no
document enters, or backward that none leaves, where the host knows it.

The op is one node to passes; autograd, and AOTAutograd with it, sees what it is made of: local ops, and collectives in
both directions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from packc.distributed import cost
from packc.distributed.exchange import Line
from packc.distributed.first_order import first_order
from packc.distributed.plans import Document, Place
from packc.ops import autograd
from packc.ops.mixer import MIXERS, Mixer, state_dtype
from packc.ops.registration import is_channel_first

_library = torch.library.Library("packc", "FRAGMENT")

_ROUTING = {"cu_seqlens": "Tensor", "places": "Tensor", "documents": "Tensor", "ranks": "Tensor"}
_EXCHANGE = {"size": "SymInt", "group": "str", "exchange": "str", "near": "bool"}
# Whether a document comes from the left, and goes on to the right. True where nobody knows: in a graph for all ranks.
_PASSES = {"enters": "bool", "leaves": "bool"}


def declare_all() -> None:
    """Of all mixers that have a summary."""
    for mixer in MIXERS.values():
        if mixer.summary is not None:
            _declare(mixer)


def _declare(mixer: Mixer) -> None:
    tensors = {name: mixer.arguments[name] for name in mixer.tensor_names}
    states = {"initial_state": "Tensor?", "output_final_state": "bool"}
    arguments = {**tensors, **mixer.options, **_ROUTING, **states, **_EXCHANGE, **_PASSES}
    takes = ", ".join(f"{kind} {name}" for name, kind in arguments.items())
    _library.define(f"{mixer.name}_sharded({takes}) -> (Tensor out, Tensor final_state)", tags=mixer.tags)
    names = list(arguments)

    def composite(*args: Any) -> Any:
        return _Sharded.apply(mixer, names, *args)

    _library.impl(f"{mixer.name}_sharded", composite, "CompositeImplicitAutograd")


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixer: Mixer, names: list[str], *args: Any) -> tuple[Tensor, Tensor]:
        with _without_detours(*args):
            return _Sharded._forward(ctx, mixer, names, *args)

    @staticmethod
    def _forward(ctx: Any, mixer: Mixer, names: list[str], *args: Any) -> tuple[Tensor, Tensor]:
        call = _Call(mixer, dict(zip(names, args, strict=True)))
        given, initial = call.given, call.given["initial_state"]
        transition, state = call.op("_summary")(*call.taken(call.summary.takes), call.place(Place.BEGIN))
        late, enters = call.summary.late, given["enters"]
        local = functools.cache(lambda: call.forward(call.elsewhere()))
        line = call.line(to_right=True, meanwhile=local if late is not None or not enters else _nothing)
        if initial is not None:
            of_last = initial.index_select(0, call.place(Place.LEAVES)).to(state.dtype)
            begun = line.through(transition, of_last) + state
            state = torch.where(call.place(Place.BEGINS) > 0, begun, state)
        exchange = given["exchange"]
        if exchange == "auto":
            of_transition, of_state = (x.numel() * x.element_size() for x in (transition, state))
            exchange = cost.quickest(given["size"], of_transition, of_state, given["near"])
        found = line.send(exchange, transition, state)
        if late is None and enters:
            out, final, *kept = call.forward(call.before(found.entering))
        else:
            out, final, *kept = results = local()
        if late is not None and enters:
            taken = call.taken(late.enter_takes)
            call.op("_enter")(*results, found.entering, *taken, call.place(Place.END), call.place(Place.ENTERS))
        if given["output_final_state"]:
            final = torch.where(call.row(Document.ENDS, final), final, 0)
        ctx.mixer, ctx.exchange, ctx.arguments = mixer, exchange, names
        ctx.others = {name: x for name, x in given.items() if not isinstance(x, Tensor)}
        saved = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        saved |= {"entering": found.entering, "transition": transition, "transitions": found.transitions}
        saved |= dict(zip((name for name in mixer.keeps if name != "out"), kept, strict=True))
        ctx.saved = list(saved)
        ctx.save_for_backward(*saved.values())
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        with _without_detours(*saved, dout, dfinal):
            return _Sharded._backward(ctx, saved, dout, dfinal)

    @staticmethod
    def _backward(ctx: Any, saved: Sequence[Tensor], dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        mixer: Mixer = ctx.mixer
        call = _Call(mixer, ctx.others | dict(zip(ctx.saved, saved, strict=True)))
        given, summary, initial = call.given, call.summary, call.given["initial_state"]
        if dout is None:
            sizes = mixer.shapes.sizes({name: getattr(given[name], "shape", None) for name in mixer.tensor_names})
            dout = given[mixer.like].new_zeros(mixer.out_shape(sizes))
        if dfinal is not None:
            dfinal = torch.where(call.row(Document.ENDS, dfinal), dfinal, 0)
        entering, late, leaves = given["entering"], summary.late, given["leaves"]
        before = call.before(entering)
        local = functools.cache(lambda: call.gradients(dout, dfinal, before))
        if not given["enters"]:
            dentering = torch.zeros_like(entering)
        elif dfinal is None:
            state = {"initial_state": entering}
            takes = [*call.wide([dout]), *call.taken(summary.adjoint_takes, state)]
            dentering = call.op("_adjoint")(*takes, call.place(Place.END))
        else:
            # Gradients of final states, too, go through the first segment, of which there is no transition.
            dentering = local()["initial_state"].index_select(0, call.place(Place.ENTERS))
        line = call.line(to_right=False, meanwhile=local if late is not None or not leaves else _nothing)
        sent = line.send(ctx.exchange, given["transition"], dentering.to(entering.dtype), given["transitions"])
        leaving = sent.entering
        if not leaves:
            found = local()
        elif late is not None:
            found = local()
            changed = [found[name] for name in late.leave_changes]
            last = before.index_select(0, call.place(Place.LEAVES))
            call.op("_leave")(*changed, leaving, last, *call.taken(late.leave_takes), call.place(Place.BEGIN))
            if initial is not None:
                of_begun = torch.where(call.place(Place.BEGINS) > 0, line.through(given["transition"], leaving), 0)
                dinitial = found["initial_state"]
                found["initial_state"] = torch.where(call.row(Document.LEAVES, dinitial), dinitial + of_begun, dinitial)
        else:
            of_last = call.row(Document.LEAVES, leaving)
            found = call.gradients(dout, torch.where(of_last, leaving, 0 if dfinal is None else dfinal), before)
        if initial is not None:
            dinitial = found["initial_state"].to(initial.dtype)
            found["initial_state"] = torch.where(call.row(Document.ENTERS, dinitial), 0, dinitial)
        return None, None, *[found.get(name) if given.get(name) is not None else None for name in ctx.arguments]


def _without_detours(*args: Any) -> contextlib.AbstractContextManager[Any]:
    """No op within is differentiated: where nothing else is to be told of them, none asks whether it is."""
    return autograd.below_autograd() if autograd.runs_on_cpu(*args) else contextlib.nullcontext()


def _nothing() -> None:
    """What an op does that waits for its exchange."""


@functools.cache
def _op(name: str, suffix: str) -> Callable[..., Any]:
    return getattr(torch.ops.packc, f"{name}{suffix}").default


class _Call:
    """Of the op, with its arguments by name, and in the backward with what was kept."""

    def __init__(self, mixer: Mixer, given: Mapping[str, Any]) -> None:
        assert mixer.summary is not None
        self.mixer, self.summary, self.given = mixer, mixer.summary, given
        self.dtype = state_dtype(*[given[name] for name in mixer.differentiable])

    def op(self, suffix: str) -> Callable[..., Any]:
        return _op(self.mixer.name, suffix)

    def place(self, which: Place) -> Tensor:
        return self.given["places"][which : which + 1]

    def row(self, which: Document, states: Tensor) -> Tensor:
        """Which of ``states (N, ...)`` are meant."""
        return self.given["documents"][which].view(-1, *[1] * (states.ndim - 1))

    def taken(self, names: Sequence[str], others: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
        given = {**self.given, **others}
        return self.wide([given[name] for name in names])

    def wide(self, arguments: Sequence[Any]) -> list[Any]:
        """In fp64 if states are, of which not all arguments need tell."""
        if self.dtype is not torch.float64:
            return list(arguments)
        return [x.double() if isinstance(x, Tensor) else x for x in arguments]

    def line(self, to_right: bool, meanwhile: Callable[[], Any]) -> Line:
        through = self.summary.through if to_right else self.summary.through_adjoint
        ranks, size, group = (self.given[name] for name in ("ranks", "size", "group"))
        fold, read = self.op("_fold" if to_right else "_fold_adjoint"), self.taken(self.summary.through_takes)
        weights = dict(zip(self.summary.through_takes, read, strict=True))
        return Line(
            ranks,
            size,
            group,
            lambda t, state: through(t, state, weights),
            self.summary.compose,
            lambda transitions, states, *marks: fold(transitions, states, *read, *marks),
            to_right,
            meanwhile,
        )

    def before(self, entering: Tensor) -> Tensor:
        """The initial states of this rank's documents, as the local op gets them: of one of them, what enters."""
        initial = self.given["initial_state"]
        others = 0 if initial is None else initial.to(entering.dtype)
        return torch.where(self.row(Document.ENTERS, entering), entering, others)

    def elsewhere(self) -> Tensor | None:
        """The same without what enters."""
        initial = self.given["initial_state"]
        return None if initial is None else torch.where(self.row(Document.ENTERS, initial), 0, initial)

    def forward(self, initial: Tensor | None) -> Sequence[Tensor]:
        """Of the local op."""
        local = {**self.given, "initial_state": initial}
        return self.op("")(*[local[name] for name in self.mixer.arguments])

    def gradients(self, dout: Tensor, dfinal: Tensor | None, initial: Tensor | None) -> dict[str, Tensor]:
        """Of the local op, by name."""
        given = {**self.given, "initial_state": initial, "dout": dout, "dfinal_state": dfinal}
        given |= {f"channel_first_d{name}": is_channel_first(given[name]) for name in self.mixer.own_layout}
        found = self.op("_bwd")(*[given[name] for name in self.mixer.backward_arguments])
        return dict(zip(self.mixer.differentiable, found, strict=True))
