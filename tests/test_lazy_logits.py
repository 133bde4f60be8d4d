"""Logits beside a loss: nothing is computed of them until somebody reads them, and then they are right."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from harness import (
    FULL,
    LEFT,
    RIGHT,
    PlainLM,
    assert_same_step,
    batch_of,
    exact_step,
    shaken,
    train_step,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from packc.lazy_logits import LazyLogits, PackedLogits
from packc.ops import causal_conv1d, linear_cross_entropy
from packc.passes import Tail

V = 64
DEBUG = {"packc.inner": "aot_eager", "packc.strict": True}


def compiled_with(model, **options):
    return torch.compile(model, backend="packc", options={**DEBUG, **options})


def inputs_of(rows=RIGHT, vocab=V):
    batch = batch_of(rows, vocab)
    return batch["input_ids"], batch["attention_mask"], batch["labels"]


@pytest.fixture(scope="module")
def pair():
    """A model, compiled, and itself in fp64."""
    torch.manual_seed(0)
    model = PlainLM(V, layers=1)
    return compiled_with(model, **{"packc.strict": True}), copy.deepcopy(model).double()


def padded(logits, mask):
    return torch.where(mask[..., None].bool(), logits, 0)


def is_untouched(logits):
    return type(logits) is LazyLogits and logits.values_of._values is None


# ---- whole models ----------------------------------------------------------------------------------------------------


def small(family):
    import transformers

    options = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 1 + (family == "Bamba"), "use_cache": False}
    attention = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    scan = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}
    families = {
        "Mamba": {"state_size": 4, "time_step_rank": 4},
        "Llama": attention,
        "Bamba": {**attention, **scan, "attn_layer_indices": [1]},
        "Granite": {**attention, "logits_scaling": 2.0},
    }
    config = getattr(transformers, f"{family}Config")(**options, **families[family])
    return shaken(getattr(transformers, f"{family}ForCausalLM")(config))


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("Llama", "Bamba", "Granite")]


@pytest.mark.parametrize("family", ["Mamba", *SLOW])
def test_a_training_step_equals_eager(family):
    model = small(family)
    compiled = compiled_with(model, **{"packc.strict": False})
    for rows in (RIGHT, LEFT if family == "Mamba" else FULL):
        batch = batch_of(rows, 128)
        assert is_untouched(compiled(**batch).logits)
        assert_same_step(train_step(compiled, batch), exact_step(model, batch), batch["attention_mask"])


@pytest.mark.slow
def test_a_training_step_under_inductor_equals_eager():
    model = small("Llama")
    compiled = torch.compile(model, backend="packc", options={"packc.strict": True}, fullgraph=True)
    for rows in (RIGHT, FULL, ["".join(2 * token for token in row) for row in RIGHT]):
        batch = batch_of(rows, 128)
        assert_same_step(train_step(compiled, batch), exact_step(model, batch), batch["attention_mask"])


def test_gradients_through_the_loss_and_through_logits_add_up(pair):
    inputs, found = inputs_of(), []
    for model in pair:
        model.zero_grad()
        loss, logits = model(*inputs)
        more = padded(logits, inputs[1]).log_softmax(-1)[..., ::3].exp().sum()
        (loss + 0.1 * more).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for value, expected in zip(*found, strict=True):
        assert (value.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_model_recomputes_it(pair, reentrant):
    inputs, found = inputs_of(), []
    pair[0](*inputs)  # what compiling saves would count among what the forward saves
    for model in pair:
        model.zero_grad()
        scale = torch.ones((), requires_grad=True)

        def run(scale, model=model):
            loss, logits = model(*inputs)
            return loss * scale, padded(logits, inputs[1]).square().mean() * scale

        sum(checkpoint(run, scale, use_reentrant=reentrant)).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for value, expected in zip(*found, strict=True):
        assert (value.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_step_that_uses_the_loss_alone_holds_nothing_as_large_as_logits(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "_TOKENS", 4)
    monkeypatch.setattr(linear_cross_entropy, "_LOGITS", 1)
    vocab = 4096
    compiled, inputs = compiled_with(PlainLM(vocab, layers=1)), inputs_of(vocab=vocab)
    compiled(*inputs)[0].backward()
    with torch.profiler.profile(profile_memory=True) as record:
        loss, logits = compiled(*inputs)
        loss.backward()
    assert is_untouched(logits)
    largest = max(event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]")
    assert largest < inputs[1].sum() * vocab * 4


# ---- what is done with them ------------------------------------------------------------------------------------------


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


def in_place(x):
    x.div_(3.0)
    x[:, 0].mul_(5.0)
    return x.exp()


def copied_before_a_write(x):
    copied, alias = x.half(), x.detach()
    alias.zero_()
    return copied


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def of_a_graph(x):
    return torch.compile(lambda y: y.sin() * 2, backend="aot_eager", fullgraph=True)(x)


USES = {
    "an op": lambda x: x * 2,
    "a view": lambda x: x[:, 1:3].flatten(0, 1),
    "a copy": lambda x: x.clone(),
    "another dtype": lambda x: x.half().float(),
    "rows": lambda x: torch.stack(list(x)),
    "a loss": lambda x: F.cross_entropy(x.view(-1, V), torch.arange(24)),
    "written to": in_place,
    "copied before it is written to": copied_before_a_write,
    "a function with a backward of its own": lambda x: Square.apply(x),
    "a compiled function": of_a_graph,
    "its gradient": lambda x: torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)[0],
    "a checkpoint": lambda x: checkpoint(torch.sin, x, use_reentrant=False),
    "vmap": lambda x: torch.vmap(torch.sin)(x),
    "without its gradient": lambda x: x.detach() + 1,
    "its data": lambda x: x.data.cpu(),
    "numpy": lambda x: torch.from_numpy(np.asarray(x.detach()) + x.detach().numpy()),
    "a list": lambda x: torch.tensor(x.tolist()),
    "a file": lambda x: saved(x.detach()),
    "a pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "a deep copy": lambda x: copy.deepcopy(x.detach()),
    "in another library": lambda x: torch.utils.dlpack.from_dlpack(x.detach()),
    "shared": lambda x: x.detach().share_memory_(),
}


def test_they_are_right_wherever_they_are_read(pair, subtests):
    for name, use in USES.items():
        with subtests.test(name):
            assert_right(pair, use)


def assert_right(pair, use):
    compiled, exact = pair
    inputs = inputs_of()
    logits = compiled(*inputs)[1]
    assert is_untouched(logits)
    found, expected = use(logits), use(padded(exact(*inputs)[1], inputs[1]))
    assert found.requires_grad == expected.requires_grad
    tolerance = 1e-3 if "half" in use.__code__.co_names else 1e-5
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()
    if not found.requires_grad:
        return
    gradients = []
    for model, result in zip(pair, (found, expected), strict=True):
        model.zero_grad()
        result.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for value, wanted in zip(*gradients, strict=True):
        assert (value.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_what_is_asked_of_no_entry_computes_nothing(pair):
    inputs = inputs_of()
    logits = pair[0](*inputs)[1]
    stock = padded(pair[1].float()(*inputs)[1], inputs[1])
    pair[1].double()

    def asked(x):
        return [
            *(
                isinstance(x, torch.Tensor),
                torch.is_tensor(x),
                x.shape,
                x.stride(),
                x.dtype,
                x.device,
                x.layout,
                len(x),
            ),
            *(x.requires_grad, x.is_leaf, x.is_contiguous(), x.numel(), x.nbytes, x.detach().requires_grad, x.type()),
            *(x.detach().double().dtype, x.is_floating_point(), x.contiguous().shape, x.to("cpu").shape),
        ]

    assert asked(logits) == asked(stock)
    assert is_untouched(logits)
    assert "grad_fn=<PackedLogitsBackward>" in repr(logits)


def test_derivatives_of_the_second_order_go_through_them():
    index = torch.tensor([0, 1, 4])
    steps = ((torch.ops.aten.tanh.default, (), {}),)
    tail = Tail(output=0, weight=0, bias=None, index=0, sizes=(2, 3), steps=steps, dtype=torch.float64)
    hidden, weight, bias = (torch.randn(*size, dtype=torch.float64) for size in ((1, 3, 2), (4, 2), (4,)))

    def logits(hidden, weight, bias):
        return PackedLogits.apply(tail, torch.Size((2, 3, 4)), hidden, index, weight, bias) * 1

    leaves = [each.requires_grad_() for each in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(logits, leaves)
    assert torch.autograd.gradgradcheck(logits, leaves)


# ---- what has changed since ------------------------------------------------------------------------------------------


def in_place_of(weight):
    weight[0, 0] += 1


def behind_autograds_back(weight):
    weight.data.mul_(1.01)


def freed(weight):
    """As FSDP frees what it has gathered."""
    weight.untyped_storage().resize_(0)


def test_logits_of_weights_that_have_changed_raise(subtests):
    model, inputs = PlainLM(V, layers=1), inputs_of()
    compiled = compiled_with(model)
    for write in (in_place_of, behind_autograds_back, freed):
        with subtests.test(write.__name__):
            logits = compiled(*inputs)[1]
            with torch.no_grad():
                write(model.head.weight)
            with pytest.raises(RuntimeError, match=r"weights of the head changed.*set packc.lazy_logits"):
                logits.sum()


def test_what_was_read_before_the_weights_change_stays(pair):
    model = PlainLM(V, layers=1)
    loss, logits = compiled_with(model)(*inputs_of())
    before = logits.detach().clone()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert logits.equal(before)


# ---- where they are computed at once ---------------------------------------------------------------------------------


def test_without_gradients_or_by_the_option_they_are_computed_at_once():
    model, inputs = PlainLM(V, layers=1), inputs_of()
    with torch.no_grad():
        assert type(compiled_with(model)(*inputs)[1]) is torch.Tensor
    assert type(compiled_with(model, **{"packc.lazy_logits": False})(*inputs)[1]) is torch.Tensor


def test_before_a_graph_break_they_are_computed_at_once():
    model, seen = PlainLM(V, layers=1), []

    def step(*inputs):
        loss, logits = model(*inputs)
        torch._dynamo.graph_break()
        seen.append(logits)
        return loss + logits.sum()

    compiled_with(step, **{"packc.strict": False})(*inputs_of())
    assert type(seen[0]) is torch.Tensor


def test_under_autocast_they_are_what_they_would_have_been():
    model, inputs = PlainLM(V, layers=1), inputs_of()
    compiled, at_once = compiled_with(model), compiled_with(model, **{"packc.lazy_logits": False})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (loss, logits), (same, expected) = compiled(*inputs), at_once(*inputs)
    assert is_untouched(logits.float())  # as accelerate does with whatever is in low precision
    assert logits.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(logits + 0, expected)
    torch.testing.assert_close(loss, same)


@pytest.mark.slow
def test_fake_tensors_come_through():
    from torch._subclasses import FakeTensorMode

    compiled, inputs = compiled_with(PlainLM(V, layers=1)), inputs_of()
    compiled(*inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _, logits = compiled(*(mode.from_tensor(each) for each in inputs))
    assert logits.shape == (3, 8, V)


@pytest.mark.parametrize("kinds", [torch.tensor([1, 0, 2]), torch.eye(3, V)], ids=["labels", "shares of classes"])
def test_those_of_rows_have_an_axis_less(kinds):
    weight = torch.nn.Parameter(torch.randn(V, 4))

    def model(x, attention_mask, kinds):
        mixed = causal_conv1d(x * attention_mask[..., None], torch.ones(4, 3))
        pooled = (mixed * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        logits = F.linear(pooled, weight)
        return F.cross_entropy(logits.view(-1, V), kinds * 1), logits

    _, mask, _ = inputs_of()
    given = torch.randn(*mask.shape, 4), mask, kinds
    loss, logits = torch.compile(model, backend="packc", options=DEBUG)(*given)
    assert is_untouched(logits) is not kinds.is_floating_point()
    assert logits.shape == (len(mask), V)
    torch.testing.assert_close((loss, logits + 0), model(*given))


def test_where_somebody_else_than_ddp_may_free_weights_they_are_computed_at_once(tmp_path):
    inputs = inputs_of()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert type(compiled_with(PlainLM(V, layers=1))(*inputs)[1]) is torch.Tensor
        torch._dynamo.reset()
        assert is_untouched(compiled_with(torch.nn.parallel.DistributedDataParallel(PlainLM(V, layers=1)))(*inputs)[1])
    finally:
        torch.distributed.destroy_process_group()
