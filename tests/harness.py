"""What the tests share: a recording backend, padded batches, small models, and the comparison of two of them."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F

import packc
from packc.compiler import compile_graph, pack_graph
from packc.passes import NoMask, NotPackable


class RecordingBackend:
    """packc's backend without code generation, which keeps each graph before and after packing."""

    __packc_backend__ = True

    def __init__(self, inner: str = "aot_eager") -> None:
        self.inner = inner
        self.before: list[torch.fx.GraphModule] = []
        self.after: list[torch.fx.GraphModule] = []
        self.reasons: list[str] = []

    def __call__(self, gm, example_inputs, **_):
        self.before.append(gm)
        try:
            self.after.append(pack_graph(gm, example_inputs).gm)
        except (NoMask, NotPackable) as reason:
            self.reasons.append(str(reason))
        with packc.config.patch(inner=self.inner):
            return compile_graph(gm, example_inputs)[0]

    def op_count(self, op) -> int:
        """Calls of an op in the last packed graph."""
        return Counter(node.target for node in self.after[-1].graph.nodes)[op]


def code(gm: torch.fx.GraphModule) -> str:
    """The body of a graph, one readable line a node, without signature and clean-up."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        args = ", ".join([*map(_text, node.args), *(f"{k}={_text(v)}" for k, v in node.kwargs.items())])
        lines.append(f"return {args}" if node.op == "output" else f"{node.name} = {_name(node.target)}({args})")
    return "\n".join(lines)


def _name(target) -> str:
    return str(target) if isinstance(target, (str, torch._ops.OpOverload)) else target.__name__


def _text(arg) -> str:
    if isinstance(arg, (list, tuple)):
        return "(" + ", ".join(map(_text, arg)) + ")"
    return str(arg)


def masks(rows: list[str]) -> torch.Tensor:
    """A mask from pictures of its rows: ``masks(["11100", "00111"])``."""
    return torch.tensor([[int(c) for c in row] for row in rows])


RIGHT = ["11111111", "11111000", "11000000"]
LEFT = ["11111111", "00011111", "00000011"]
BOTH = ["11111111", "00111100", "01111111"]
EMPTY_ROW = ["11111100", "00000000", "11110000"]
FULL = ["11111111", "11111111", "11111111"]
ONE_ROW = ["11111100"]
HOLE = ["11111111", "11011000", "11100000"]
ALIGNED = {"right": RIGHT, "left": LEFT, "both": BOTH, "empty row": EMPTY_ROW, "full": FULL, "one row": ONE_ROW}


def batch_of(rows: list[str], vocab: int = 32) -> dict[str, torch.Tensor]:
    """A language-modelling batch with this mask; padding has token ids too, and ignored labels."""
    mask = masks(rows)
    ids = torch.randint(1, vocab, mask.shape)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def tiny_mamba(*, layers: int = 2, **options) -> nn.Module:
    """A stock ``MambaForCausalLM`` whose weights are far enough from their initial values for states to matter."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=layers,
        state_size=4,
        time_step_rank=4,
        use_cache=False,
        **options,
    )
    return shaken(MambaForCausalLM(config))


def tiny_falcon_mamba() -> nn.Module:
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    # Four features in the time step: it is normalised, and of one feature alone only the sign would be left.
    config = FalconMambaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4, use_cache=False
    )
    return shaken(FalconMambaForCausalLM(config))


def tiny_mamba2() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
        use_cache=False,
    )
    return shaken(Mamba2ForCausalLM(config))


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.train()


class PlainLM(nn.Module):
    """A language model of plain torch and one mixer, its loss written as people write it."""

    def __init__(self, vocab: int = 32, hidden: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(64, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        self.taps = nn.ParameterList(nn.Parameter(torch.randn(hidden, 4) / 2) for _ in range(layers))
        self.mlps = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.head = nn.Linear(hidden, vocab)

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for norm, taps, mlp in zip(self.norms, self.taps, self.mlps, strict=True):
            x = norm(h) * mask[..., None]
            h = h + mlp(packc.ops.causal_conv1d(x, taps, activation="silu"))
        return h

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor):
        logits = self.head(self.hidden(ids, mask))
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        return loss, logits


def train_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss, logits and every parameter's gradient of one step of a Hugging Face model."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **{_plain(n): g for n, g in gradients.items()}}


def exact_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """:func:`train_step` of the eager model in fp64: what every fp32 implementation is an approximation of."""
    return train_step(copy.deepcopy(model).double(), batch)


def _plain(name: str) -> str:
    return name.removeprefix("_orig_mod.")


def assert_same_step(actual, expected, mask: torch.Tensor, *, rtol: float = 1e-5) -> None:
    """Equal up to ``rtol`` of the largest entry: loss, gradients, and logits at real tokens."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        got = actual[name]
        if name == "logits":
            assert got.shape == value.shape
            assert got.stride() == value.stride()
            got, value = got[mask.bool()], value[mask.bool()]
        if value.numel():
            scale = value.abs().max().item()
            torch.testing.assert_close(
                got.double(), value.double(), rtol=0, atol=rtol * scale, msg=lambda m, name=name: f"{name}: {m}"
            )
