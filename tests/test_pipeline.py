"""The passes can be followed from outside, and left out one by one where that makes sense."""

import logging

import pytest
import torch
from harness import RIGHT, RecordingBackend, masks

import packc
from packc import pipeline

TAPS = torch.randn(4, 2)
X, MASK = torch.randn(3, 8, 4), masks(RIGHT)


def residual_in_place(x, attention_mask):
    y = packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS)
    y += x
    return y


def reasons(**options):
    torch._dynamo.reset()
    backend = RecordingBackend()
    with packc.config.patch(**options):
        torch.compile(residual_in_place, backend=backend)(X, MASK)
    return backend.reasons


@pytest.mark.parametrize("names", ["functional", "functional,widen_losses", ["functional"]])
def test_a_pass_may_be_left_out(names):
    assert reasons() == []
    (reason,) = reasons(skip_passes=names)
    assert "add_.Tensor in the model: writes in place" in reason


@pytest.mark.parametrize("name", ["layout", "typo"])
def test_one_that_nothing_packs_without_may_not(name):
    compiled = torch.compile(residual_in_place, backend="packc", options={"packc.skip_passes": name})
    with pytest.raises(Exception, match=rf"packc.skip_passes: \['{name}'\] cannot be left out; it takes .*'cut_late'"):
        compiled(X, MASK)


def test_each_pass_logs_its_time_and_the_ops_that_came_and_went(caplog):
    with caplog.at_level(logging.DEBUG, "packc.pipeline"):
        reasons()
    lines = [record.getMessage() for record in caplog.records]
    for each in (*pipeline.READ, *pipeline.FIND, *pipeline.PACK):
        assert any(line.startswith(f"{each.__name__}: ") and " ms" in line for line in lines)
    functional = next(line for line in lines if line.startswith("functional: "))
    assert functional.endswith("+1 aten.add.Tensor, -1 aten.add_.Tensor")


def test_a_pass_that_changes_the_graph_shows_it(caplog):
    with caplog.at_level(logging.DEBUG, "packc.pipeline"):
        reasons()
    shown = {record.args[0] for record in caplog.records if record.msg.startswith("%s\n")}
    assert shown == {"packc_before", "packc_normalize", "packc_functional", "packc_after"}
