"""Precision, parameters and checkpoints as people set them: each trains as it does in eager."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from harness import LEFT, RIGHT, PlainLM, batch_of
from live_memory import peak_bytes
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import packc

OPTIONS = {"packc.inner": "aot_eager", "packc.strict": True}
PACKC = {"backend": "packc", "options": OPTIONS}


@dataclass
class Way:
    """How a model is made and trained."""

    model: Callable[[], nn.Module] = PlainLM
    step: Callable[..., Iterator[torch.Tensor]] | None = None
    """A step with (call, model, optimizer, batches); yields losses."""
    around: Callable[[], Any] = contextlib.nullcontext
    """Entered around the forward."""
    rtol: float = 1e-5


def plain(call, model, optimizer, batches, around) -> Iterator[torch.Tensor]:
    for batch in batches:
        with around():
            loss, _ = call(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def accumulating(call, model, optimizer, batches, around) -> Iterator[torch.Tensor]:
    for batch in batches:
        loss, _ = call(*batch)
        (loss / len(batches)).backward()
        yield loss
    optimizer.step()


def scaled(call, model, optimizer, batches, around) -> Iterator[torch.Tensor]:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for batch in batches:
        with around():
            loss, _ = call(*batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield loss


def with_a_compiled_optimizer(call, model, optimizer, batches, around) -> Iterator[torch.Tensor]:
    optimizer.step = torch.compile(optimizer.step, **PACKC | {"options": {"packc.inner": "aot_eager"}})
    yield from plain(call, model, optimizer, batches, around)


def with_an_average(call, model, optimizer, batches, around) -> Iterator[torch.Tensor]:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for batch in batches:
        yield from plain(call, model, optimizer, [batch], around)
        average.update_parameters(model)
        with torch.no_grad():
            yield average(*batch)[0]


def frozen() -> nn.Module:
    model = PlainLM()
    model.tokens.requires_grad_(False)
    model.mlps[0].requires_grad_(False)
    model.taps[1].requires_grad_(False)
    return model


def tied() -> nn.Module:
    model = PlainLM()
    model.head.weight = model.tokens.weight
    return model


def with_adapters() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["head", "mlps.0"]), PlainLM())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide a wrong gradient of lora_A
            nn.init.normal_(parameter)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 4
    return model


class Checkpointed(PlainLM):
    """Each of its blocks is computed again in the backward."""

    def __init__(self, hidden: int = 8, layers: int = 2, **how: Any) -> None:
        super().__init__(hidden=hidden, layers=layers)
        self.how = how

    def block(self, h: torch.Tensor, mask: torch.Tensor, n: int) -> torch.Tensor:
        x = self.norms[n](h) * mask[..., None]
        return h + self.mlps[n](packc.ops.causal_conv1d(x, self.taps[n], activation="silu"))

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for n in range(len(self.mlps)):
            h = checkpoint(self.block, h, mask, n, **self.how)
        return h


def keep_convolutions(context, op, *args, **kwargs):
    kept = op is torch.ops.packc.causal_conv1d.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective() -> nn.Module:
    return Checkpointed(
        use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, keep_convolutions)
    )


BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
FP16 = partial(torch.autocast, "cpu", torch.float16)
WAYS = {
    "autocast to bf16": Way(around=BF16, rtol=3e-2),
    "autocast to fp16, scaled": Way(step=scaled, around=FP16, rtol=1e-2),
    "bf16 parameters": Way(lambda: PlainLM().bfloat16(), rtol=3e-2),
    "frozen parameters": Way(frozen),
    "tied embeddings": Way(tied),
    "adapters": Way(with_adapters),
    "accumulated gradients": Way(step=accumulating),
    "a compiled optimizer": Way(step=with_a_compiled_optimizer),
    "an average of the weights": Way(step=with_an_average),
    "checkpoints": Way(partial(Checkpointed, use_reentrant=False)),
    "reentrant checkpoints": Way(partial(Checkpointed, use_reentrant=True)),
    "selective checkpoints": Way(selective),
    "selective checkpoints under autocast": Way(selective, around=BF16, rtol=3e-2),
}
QUICK = {"autocast to fp16, scaled", "adapters", "selective checkpoints"}


def trained(way: Way, compile_in_place: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, and parameters after two steps."""
    torch.manual_seed(0)
    model = way.model()
    if compile_in_place:
        model.compile(**PACKC)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batches = [tuple(batch_of(rows).values()) for rows in (RIGHT, LEFT)]
    before = packc.stats()["steps"]
    losses = [loss.detach() for loss in (way.step or plain)(model, model, optimizer, batches, way.around)]
    assert (packc.stats()["steps"] > before) == compile_in_place
    return losses, model.state_dict()


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in WAYS]
)
def test_trains_as_in_eager(name):
    way = WAYS[name]
    losses, state = trained(way, True)
    expected_losses, expected = trained(way, False)
    assert state.keys() == expected.keys()
    for got, want in zip([*losses, *state.values()], [*expected_losses, *expected.values()], strict=True):
        assert got.dtype == want.dtype
        scale = want.abs().max().item()
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=way.rtol * scale)


@pytest.mark.parametrize("name", ["checkpoints", "reentrant checkpoints", "selective checkpoints"])
@pytest.mark.slow
def test_a_checkpointed_convolution_runs_as_often_as_the_policy_says(name, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        convolutions = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.convolutions += op is torch.ops.packc.causal_conv1d.default
            return op(*args, **kwargs or {})

    model = WAYS[name].model()
    model.compile(**PACKC)
    batch = tuple(batch_of(RIGHT).values())
    model(*batch)[0].backward()
    with Counting() as counting:
        model(*batch)[0].backward()
    assert counting.convolutions == (2 if name == "selective checkpoints" else 4)


def test_checkpoints_free_memory_of_packed_steps_as_they_do_of_stocks():
    batch = tuple(batch_of(["1" * n + "0" * (64 - n) for n in (64, 32, 24, 8)]).values())

    def peak(model, packed):
        if packed:
            model.compile(**PACKC)

        def step():
            model.zero_grad()
            model(*batch)[0].backward()

        step()
        return peak_bytes(step)

    sizes = {"hidden": 32, "layers": 8}
    packed, freed = peak(PlainLM(**sizes), True), peak(Checkpointed(**sizes, use_reentrant=False), True)
    of_stock, freed_of_stock = peak(PlainLM(**sizes), False), peak(Checkpointed(**sizes, use_reentrant=False), False)
    assert freed < 0.6 * packed
    assert packed < 0.75 * of_stock
    assert freed < 0.75 * freed_of_stock
