"""``packc.stats()`` counts what packed graphs did, over all models and threads, and nothing else."""

import threading
import time
from collections import Counter

import pytest
import torch
from harness import HOLE, RIGHT, masks

import packc
from packc import totals
from packc.batches import Rows, pack_batches

OPTIONS = {"packc.inner": "eager"}
TAPS = torch.ones(4, 2)


def model(x, attention_mask):
    return packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS)


@pytest.fixture
def added():
    """What was added to the totals since the test began, without what is zero."""
    before = packc.stats()
    return lambda: _difference(packc.stats(), before)


def _difference(now, before):
    if not isinstance(now, dict):
        return now - (before or 0)
    found = {key: _difference(value, (before or {}).get(key)) for key, value in now.items()}
    return {key: value for key, value in found.items() if value not in (0, {})}


def test_steps_tokens_and_whole_rows_add_up(added):
    compiled = torch.compile(model, backend="packc", options=OPTIONS)
    x = torch.randn(3, 8, 4)
    compiled(x, masks(RIGHT))
    with pytest.warns(UserWarning, match="padding between tokens"):
        compiled(x, masks(HOLE))
    assert added() == {
        "steps": 2,
        "tokens": 15 + 8 + 8 + 3,
        "padded_tokens": 48,
        "whole_rows": {"padding between tokens of a row": 1},
        "graphs": {"packed": 1},
    }


def test_a_graph_that_is_not_packed_counts_under_its_reason(added):
    torch.compile(lambda x: x.exp(), backend="packc", options=OPTIONS)(torch.randn(3, 8))
    assert added() == {"graphs": {"unpacked": {"no (B, L) padding mask among the inputs ['x']": 1}}}


def test_what_explain_runs_is_not_counted(added):
    compiled = torch.compile(model, backend="packc", options=OPTIONS)
    assert packc.explain(compiled)(torch.randn(3, 8, 4), masks(RIGHT)).tokens == 15
    assert packc.explain(lambda x: x.exp())(torch.randn(3, 8)).tokens is None
    assert added() == {}


def test_what_a_backward_computes_again_is_not_counted(added):
    (packing,) = pack_batches([Rows(masks(RIGHT))])
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: totals.count_step([packing]))
    (2 * x).backward()
    assert x.grad is not None
    assert added() == {}


def test_a_call_of_several_sequences_is_one_step_with_the_tokens_of_all(added):
    totals.count_step(pack_batches([Rows(masks(RIGHT)), Rows(masks(HOLE))]))
    assert added() == {
        "steps": 1,
        "tokens": 15 + 8 + 8 + 3,
        "padded_tokens": 48,
        "whole_rows": {"padding between tokens of a row": 1},
    }


class SlowlyRead(Counter):
    """Gives other threads time to write between a read and the write that follows it."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        time.sleep(1e-5)
        return value


def test_threads_lose_no_step(monkeypatch):
    monkeypatch.setattr(totals, "_sums", SlowlyRead())
    (packing,) = pack_batches([Rows(masks(RIGHT))])

    def steps():
        for _ in range(50):
            totals.count_step([packing])

    threads = [threading.Thread(target=steps) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert packc.stats()["steps"] == 200
    assert packc.stats()["tokens"] == 200 * 15


def test_a_snapshot_is_the_callers_own(added):
    packc.stats()["graphs"]["packed"] += 1
    assert added() == {}
