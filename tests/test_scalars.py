"""Numbers in a graph pack like everything else: arguments that change from call to call, and 0-d tensors read with
``.item()``, which is also how Dynamo hands over floats once they are dynamic."""

import copy

import torch
from harness import BOTH, RIGHT, PlainLM, batch_of
from torch.nn import functional as F

import packc


class ScaledLM(PlainLM):
    def __init__(self) -> None:
        super().__init__(layers=1)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, ids, mask, labels, rate, width, double, temperature):
        h = self.hidden(ids, mask) * self.scale.item() + self.scale
        h = F.layer_norm(h, h.shape[-1:], eps=rate)
        h = h.clamp(-rate, width).masked_fill(mask[..., None] == 0, rate) / (self.count.item() + width)
        logits = self.head(2 * h if double else h) / temperature
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=rate)
        return rate * loss, logits, rate * width


def test_numbers_may_change_from_call_to_call():
    model = ScaledLM()
    eager = copy.deepcopy(model)
    # Without the first, Dynamo breaks the graph at ``.item()``.
    with torch._dynamo.config.patch(capture_scalar_outputs=True, specialize_float=False):
        compiled = torch.compile(
            model, backend=packc.backend, dynamic=True, options={"packc.inner": "aot_eager", "packc.strict": True}
        )
        for rows, numbers in [(RIGHT, (0.5, 2, True)), (BOTH, (0.25, 3, False))]:
            arguments = [*batch_of(rows).values(), *numbers, torch.tensor(0.5 + numbers[0])]
            results = []
            for each in (compiled, eager):
                each.zero_grad()
                loss, _, product = each(*arguments)
                loss.backward()
                results.append((loss, product))
            torch.testing.assert_close(*results)
            for got, want in zip(model.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-5)
