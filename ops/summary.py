"""What the tokens of a segment do to a state that passes through them: a recurrence's summary, declared with its mixer.

Every recurrence here is affine in its state. Of a segment, some consecutive tokens of one document, whatever comes in
leaves as::

    h_out = transition h_in + state

where ``state`` is what the segment leaves behind from a state of zero, and ``transition`` is kept as compact as the
recurrence allows: a sum of logarithms where decays multiply, a matrix only where channels of the state mix. Going
backwards, the gradient ``dh_in = transition^T dh_out + dstate``, where ``dstate`` is the gradient of the state that
enters, from the segment's own results alone. A sequence cut in segments needs no more than these to be computed piece
by piece (LASP, https://arxiv.org/abs/2404.02882; Blelloch, "Prefix Sums and Their Applications", CMU-CS-90-190).

From the declaration follow ``packc::<name>_summary`` and ``packc::<name>_adjoint`` (``summary_registration.py``), those
that fold summaries of many segments (``fold_registration.py``), and from :class:`Late` two ops more
(``late_registration.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Arguments = Mapping[str, Tensor | None]
"""What a summary was taken of, by name: a transition may want weights."""

Through = Callable[[Tensor, Tensor, Arguments], Tensor]
"""``(transition, state, arguments) -> state``."""


def on_host(place: Tensor) -> bool:
    """Whether a place among tokens can be read without waiting for a device: then no others need be looked at."""
    return place.is_cpu


@dataclass(frozen=True, eq=False)
class Late:
    """What is left to do when a state, or the gradient of one, comes after the op that wants it: in place.

    Worth it where it costs less than the exchange that it lets the op hide. Of a decay per head that is one product of
    states beside four in the op, backwards two beside eight. A scan with a decay of its own for every entry of the
    state, and the delta rule, would walk their tokens once more.
    """

    enter_takes: tuple[str, ...]
    """Arguments of the mixer that ``enter`` reads."""
    enter: Callable[..., None]
    """``(kernels, results, entering, *arguments, end, document)``: changes what the op, to which no state came, has
    made of the tokens ``0 .. end`` of ``document`` to what it would have made with ``entering (1, *state)``. All
    ``results`` of the op; final states are of no document unless they were asked for."""
    leave_takes: tuple[str, ...]
    leave_changes: tuple[str, ...]
    """Arguments of which ``leave`` changes the gradients."""
    leave: Callable[..., None]
    """``(kernels, gradients, leaving, before, *arguments, begin)``: adds to ``gradients``, in the order of
    ``leave_changes``, what a gradient ``leaving (1, *state)`` of the state that leaves is to the tokens ``begin ..``.
    ``before``: the state in front of them."""
    flops: Callable[..., int]
    """Of ``enter``, of the sizes and options by name; as if all tokens were the segment's."""
    leave_flops: Callable[..., int]


@dataclass(frozen=True, eq=False)
class Summary:
    """Of a recurrence. A transition is ``(1, *transition)`` and a state ``(1, *state)``, or any number of either, one
    for each segment: :attr:`through` and its kind are plain torch on trailing axes, of fp32 or fp64 tensors.
    """

    takes: tuple[str, ...]
    """Arguments of the mixer, in its order, on which the states depend: all that ``<name>_summary`` reads."""
    adjoint_takes: tuple[str, ...]
    """Those on which the gradient of an entering state depends beside ``dout``: all that ``<name>_adjoint`` reads.
    ``initial_state``, where states do not enter results in a linear way, is the one that enters, ``(1, *state)``."""
    transition: str
    """Shape of a transition, in the letters of the mixer."""
    through: Through
    """What becomes of a state that enters."""
    compose: Callable[[Tensor, Tensor], Tensor]
    """``(first, second)``: the transition through two neighbouring segments. Associative."""
    through_takes: tuple[str, ...] = ()
    """Those of ``takes`` that :attr:`through` reads."""
    through_flops: Callable[..., int] = lambda **_: 1
    """For each entry of a state, of the sizes by name."""
    transposed: Through | None = None
    """What becomes of a gradient that comes from behind, where that is not :attr:`through` itself: of matrices."""
    summary: Callable[..., tuple[Tensor, Tensor]] | None = None
    """``(kernels, *arguments of the op) -> (transition, state)``, where kernels want their arguments in another way."""
    adjoint: Callable[..., Tensor] | None = None
    """``(kernels, *arguments of the op) -> dstate``, likewise."""
    late: Late | None = None
    """How the op and its ``_bwd`` may run before a state, or its gradient, has come, if what comes is little work."""
    flops: Callable[..., int] = field(kw_only=True)
    """Of the sizes and options, by name; as if all tokens were the segment's."""
    adjoint_flops: Callable[..., int] = field(kw_only=True)

    def through_adjoint(self, transition: Tensor, dstate: Tensor, arguments: Arguments) -> Tensor:
        """The gradient of the state that enters, from that of the state that leaves: the transpose of ``through``."""
        return (self.transposed or self.through)(transition, dstate, arguments)


def add(first: Tensor, second: Tensor) -> Tensor:
    """Composes transitions that are sums: of logarithms of decays, of step sizes."""
    return first + second


def multiply(first: Tensor, second: Tensor) -> Tensor:
    """Composes transitions that are factors."""
    return first * second


def decay_heads(transition: Tensor, state: Tensor, _: Any) -> Tensor:
    """Through a logarithm of a decay per head, ``(..., H)``, of states ``(..., H, *, *)``."""
    return transition.exp()[..., None, None] * state
