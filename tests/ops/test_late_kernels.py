"""The C++ kernels of states that come late: against plain torch in fp64, and the same bits wherever a document lies."""

from types import SimpleNamespace

import pytest
import torch
from implementations import implementation
from selective_scan_data import relative_error

from packc.ops.common.chunks import CHUNK, chunk_states_length
from packc.ops.common.late_states import Gradients, Made, enter, leave
from packc.ops.implementations import implementations
from packc.ops.linear_attention.op import MIXER

GROUPS, HEADS, K, V = 2, 6, 20, 33
pytestmark = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
)


def kernels():
    with implementation("cpu"):
        found = implementations(MIXER)(torch.float32, torch.zeros(()))
    assert hasattr(found, "enter")
    assert hasattr(found, "leave")
    return found


class Case:
    """A rank's tokens, of which the first ``length`` are looked at, or the last; results and gradients before it."""

    def __init__(self, tokens, dtype):
        torch.manual_seed(tokens)
        self.tokens = tokens
        # The halves of a projection.
        self.keys, self.dkeys = (torch.randn(1, tokens, GROUPS, 2 * K).to(dtype)[..., K:] for _ in range(2))
        self.values, self.dvalues, self.z = torch.randn(3, 1, tokens, HEADS, V).to(dtype)
        # A head that forgets nothing, one that is soon left with nothing.
        self.g = -torch.rand(1, tokens, HEADS) * torch.tensor([0, 0.001, 0.01, 0.1, 0.3, 3])
        self.step = torch.rand(1, tokens, HEADS)
        self.chunk_states = torch.randn(chunk_states_length(1, tokens, HEADS, K, V))
        self.chunk_states.view(-1, (V + 15) // 16 * 16)[:, V:] = 0
        self.finals, (self.late, self.before) = torch.randn(2, HEADS, K, V), torch.randn(2, 1, HEADS, V, K).mT

    def given(self, exact):
        """By name: copies, which a kernel may write to; in fp64 if ``exact``."""
        of_name = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return SimpleNamespace(**{name: x.double() if exact else x.clone() for name, x in of_name.items()})

    def enter(self, found, length, gated, exact=False):
        x = self.given(exact)
        made = Made(x.values, x.finals, x.chunk_states)
        z, places = x.z if gated else None, (torch.tensor([length]), torch.tensor([1]))
        enter(found, made, x.late, x.keys, x.g[:, :length], 0.3, z, *places)
        return made

    def leave(self, found, length, stepped, exact=False):
        x = self.given(exact)
        step, dstep = (x.step, torch.ones_like(x.step)) if stepped else (None, None)
        grads = Gradients(x.dkeys, x.dvalues, torch.ones_like(x.g), dstep)
        begin = torch.tensor([self.tokens - length])
        leave(found, grads, x.late, x.before, x.keys, x.values, x.g, step, begin)
        return grads


LENGTHS = (0, 1, CHUNK, 2 * CHUNK + 5)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_they_are_those_of_plain_torch_in_fp64(dtype, tolerance, length, optional):
    case = Case(150, dtype)
    pairs = [
        pair
        for change in (case.enter, case.leave)
        for pair in zip(change(kernels(), length, optional), change(None, length, optional, exact=True), strict=True)
    ]
    for found, expected in pairs:
        if expected is None:
            assert found is None
        else:
            exact = 2e-6 if found.dtype is torch.float32 else tolerance
            assert relative_error(found.double(), expected) <= exact


@pytest.mark.parametrize("length", LENGTHS[1:])
def test_a_document_has_the_same_bits_whoever_the_neighbours_are(dtype, tolerance, length):
    """And however many threads there are; and other tokens are left as they were."""
    alone, among = Case(length, dtype), Case(length + 77, dtype)
    first, last = slice(None, length), slice(77, None)
    for name in ("keys", "dkeys", "values", "dvalues", "z", "g", "step"):
        getattr(among, name)[:, first] = getattr(alone, name)
    kept = alone.chunk_states.numel()
    for name in ("late", "before", "finals"):
        setattr(among, name, getattr(alone, name))
    among.chunk_states[:kept] = alone.chunk_states
    threads = torch.get_num_threads()
    want, before = alone.enter(kernels(), length, True), among.values.clone()
    try:
        torch.set_num_threads(3)
        found = among.enter(kernels(), length, True)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found.out[:, first], want.out)
    assert torch.equal(found.out[:, length:], before[:, length:])
    assert torch.equal(found.final_state, want.final_state)
    of_document = (length - 1) // CHUNK * kept // ((length + CHUNK - 1) // CHUNK)
    assert torch.equal(found.chunk_states[:of_document], want.chunk_states[:of_document])
    assert torch.equal(found.chunk_states[of_document:], among.chunk_states[of_document:])

    for name in ("keys", "dkeys", "values", "dvalues", "z", "g", "step"):
        getattr(among, name)[:, last] = getattr(alone, name)
    want, found = alone.leave(kernels(), length, True), among.leave(kernels(), length, True)
    for got, expected in zip(found, want, strict=True):
        assert torch.equal(got[:, last], expected)
    for got, untouched in ((found.k, among.dkeys), (found.v, among.dvalues)):
        assert torch.equal(got[:, :77], untouched[:, :77])
    assert bool((found.g[:, :77] == 1).all() & (found.step[:, :77] == 1).all())
