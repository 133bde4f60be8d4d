"""On two ranks with tokens of different number, gradients are those of one process that sees both batches."""

import warnings

import pytest
import torch
import torch.distributed as dist
from harness import BOTH, RIGHT, PlainLM, batch_of
from torch.nn.parallel import DistributedDataParallel
from two_ranks import on_two_ranks

import packc

ROWS = [RIGHT, BOTH]
BUCKET_MB = 0.0005


def outside(model, **how):
    return torch.compile(DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB), backend=packc.backend, **how)


def inside(model, **how):
    return DistributedDataParallel(torch.compile(model, backend=packc.backend, **how), bucket_cap_mb=BUCKET_MB)


def in_place(model, **how):
    model.compile(backend=packc.backend, **how)
    return DistributedDataParallel(model, bucket_cap_mb=BUCKET_MB)


def batches():
    torch.manual_seed(1)
    return [batch_of(rows) for rows in ROWS]


def expected_gradients(model):
    """Of the mean over ranks of each rank's loss."""
    for batch in batches():
        (model(*batch.values())[0] / len(ROWS)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(got, expected):
    for gradients in got:
        for name, want in expected.items():
            torch.testing.assert_close(gradients[name], want, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: name + m)


def ddp_gradients(rank, combine, dynamic):
    dist._DEFAULT_FIRST_BUCKET_BYTES = 500
    warnings.filterwarnings("ignore" if dynamic else "error", message=".*in one piece")
    model = PlainLM()
    how = {"dynamic": dynamic, "options": {"packc.inner": "aot_eager", "packc.strict": True}}
    compiled = combine(model, **how)
    for _ in range(2):  # DDP rebuilds its buckets after the first
        model.zero_grad()
        compiled(*batches()[rank].values())[0].backward()
    return {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("combine", "dynamic"),
    [
        (outside, None),
        *(
            pytest.param(combine, dynamic, marks=pytest.mark.slow)
            for combine in (outside, inside, in_place)
            for dynamic in (None, True)
            if (combine, dynamic) != (outside, None)
        ),
    ],
)
def test_ddp_averages_the_gradients_of_packed_ranks(tmp_path, combine, dynamic):
    got = on_two_ranks(ddp_gradients, tmp_path, combine, dynamic)
    torch.manual_seed(0)
    assert_same_gradients(got, expected_gradients(PlainLM()))
