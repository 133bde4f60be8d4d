"""Whether a small model packs, and equals itself in eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import packc
from packc.doctor.finding import Finding


class _Model(nn.Module):
    """A next-token model of one convolution and one recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.taps = nn.Embedding(32, 8), nn.Parameter(torch.randn(8, 4) / 2)
        self.decay, self.head = nn.Linear(8, 8), nn.Linear(8, 32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        x: Any = self.embed(input_ids) * attention_mask[..., None]
        x = packc.ops.causal_conv1d(x, self.taps) * attention_mask[..., None]
        logits = self.head(packc.ops.linear_scan(self.decay(x).sigmoid(), x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def example() -> Iterator[Finding]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, ids = _Model(), torch.randint(32, (3, 12))
    mask = (torch.arange(12) < torch.tensor([12, 5, 3])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    report = packc.explain(model)(**batch)
    packed = report.fallback is None and all(mixer.packed for mixer in report.mixers)
    yield Finding("ok" if packed else "fail", "a model packs", str(report).splitlines()[0])
    compiled = torch.compile(model, backend=packc.backend, options={"packc.inner": "aot_eager"})
    parameters = list(model.parameters())
    with torch.enable_grad():
        ours, stock = (torch.autograd.grad(run(**batch), parameters) for run in (compiled, model))
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, stock, strict=True))
    yield Finding("ok" if error <= 1e-5 else "fail", "its gradients", f"within {error:.0e} of eager's")
