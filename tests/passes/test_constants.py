"""Numbers written in a model cost it nothing."""

import torch
from harness import RIGHT, RecordingBackend, masks

import packc

TAPS = torch.randn(4, 2)


def run(function):
    torch._dynamo.reset()
    backend = RecordingBackend()
    inputs = torch.randn(3, 8, 4), masks(RIGHT)
    actual, real = torch.compile(function, backend=backend)(*inputs), inputs[1].bool()
    torch.testing.assert_close(actual[real], function(*inputs)[real])
    return backend.reasons


def mix(x, attention_mask):
    return packc.ops.causal_conv1d(x * attention_mask[..., None], TAPS)


def test_a_number_and_an_empty_tensor_are_made_in_the_graph():
    assert run(lambda x, attention_mask: mix(x, attention_mask) * torch.tensor(2.5)) == []
    assert run(lambda x, attention_mask: mix(x, attention_mask) + torch.cat([torch.tensor([]), x])) == []
    assert run(lambda x, attention_mask: mix(x, attention_mask).index_select(2, torch.tensor(1))) == []
    assert run(lambda x, attention_mask: mix(x, attention_mask)[..., [2, 0]] * torch.tensor([[0.5], [2.0]])[:, 0]) == []


def test_many_numbers_leave_the_graph_unpacked():
    (reason,) = run(lambda x, attention_mask: mix(x, attention_mask) * torch.tensor([[2.0] * 4] * 17)[0])
    assert reason == "the model makes a tensor of numbers, of shape (17, 4)"


def test_an_empty_part_of_another_dtype_counts_in_the_results():
    def widened(x, attention_mask):
        return torch.cat([torch.tensor([], dtype=torch.float64), mix(x, attention_mask)])

    (reason,) = run(widened)
    assert "an empty part of another dtype" in reason
