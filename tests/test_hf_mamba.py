"""A stock Mamba under packc: the numbers of eager at real tokens, for every kind of padding, with no recompiles."""

import operator

import pytest
import torch
from harness import (
    ALIGNED,
    BOTH,
    LEFT,
    RIGHT,
    RecordingBackend,
    assert_same_step,
    batch_of,
    exact_step,
    tiny_falcon_mamba,
    tiny_mamba,
    tiny_mamba2,
    train_step,
)

CONV, SCAN = torch.ops.packc.causal_conv1d.default, torch.ops.packc.selective_scan.default
DEBUG = {"packc.inner": "aot_eager"}


def stretched(rows: list[str], times: int) -> list[str]:
    """The same padding at ``times`` the length."""
    return ["".join(c * times for c in row) for row in rows]


FAMILIES = {"mamba": tiny_mamba, "falcon_mamba": tiny_falcon_mamba, "mamba2": tiny_mamba2}
both_generations = pytest.mark.parametrize("family", ["mamba", "mamba2"])
the_first_now = pytest.mark.parametrize("family", ["mamba", pytest.param("mamba2", marks=pytest.mark.slow)])


@both_generations
def test_a_training_step_equals_eager(subtests, family):
    model = FAMILIES[family]()
    compiled = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True}, fullgraph=True)
    for padding, rows in ALIGNED.items():
        with subtests.test(padding):
            batch = batch_of(rows)
            actual, eager = train_step(compiled, batch), train_step(model, batch)
            assert_same_step(actual, exact_step(model, batch), batch["attention_mask"])
            assert {name: x.dtype for name, x in actual.items()} == {name: x.dtype for name, x in eager.items()}


@the_first_now
def test_inference_equals_eager_and_is_zero_at_padding(subtests, family):
    model = FAMILIES[family]().eval()
    compiled = torch.compile(model, backend="packc", options=DEBUG)
    for padding, rows in ALIGNED.items():
        with subtests.test(padding), torch.no_grad():
            batch = batch_of(rows)
            del batch["labels"]
            expected, actual = model(**batch).logits, compiled(**batch).logits
            real = batch["attention_mask"].bool()
            torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-5 * expected.abs().max().item())
            assert actual[~real].eq(0).all()


def test_code_is_generated_for_a_training_step():
    model, batch = tiny_mamba(layers=1), batch_of(RIGHT)
    compiled = torch.compile(model, backend="packc", options={"packc.strict": True}, fullgraph=True)
    assert_same_step(train_step(compiled, batch), exact_step(model, batch), batch["attention_mask"])


def test_each_layer_has_one_packed_conv_and_scan_and_inputs_are_gathered_once():
    backend = RecordingBackend()
    torch.compile(tiny_mamba(layers=3), backend=backend)(**batch_of(RIGHT))
    assert (backend.op_count(CONV), backend.op_count(SCAN)) == (3, 3)
    for node in backend.after[-1].graph.nodes:
        if node.target in (CONV, SCAN):
            assert "packc_cu_seqlens" in map(str, node.args)
    # token ids and mask are packed as (B, L); labels, shifted and flattened, by index
    assert backend.op_count(torch.ops.packc.pack.default) + backend.op_count(torch.ops.aten.index_select.default) == 3
    assert backend.op_count(torch.ops.packc.unpack.default) == 1


def test_the_packed_graph_calls_only_overloads_that_the_autograd_cache_knows():
    backend = RecordingBackend()
    torch.compile(tiny_mamba(layers=1), backend=backend, dynamic=True)(**batch_of(RIGHT))
    allowed = {operator.getitem, operator.mul, operator.add, operator.sub}
    targets = {node.target for node in backend.after[-1].graph.nodes if node.op == "call_function"}
    assert all(isinstance(target, torch._ops.OpOverload) or target in allowed for target in targets)
    assert not any(node.op in ("call_method", "call_module") for node in backend.after[-1].graph.nodes)


@pytest.mark.parametrize(
    "family", ["mamba", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mamba2", "falcon_mamba"))]
)
def test_other_shapes_compile_nothing_new(family):
    """One compile for the first shape, one when the length varies, one when the batch size does."""
    model = FAMILIES[family]()
    compiled = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True})
    shapes = [RIGHT, stretched(LEFT, 2), [*RIGHT, *RIGHT], stretched(RIGHT[:2], 5), stretched([*BOTH, *LEFT], 2)]
    for step, rows in enumerate(shapes):
        batch = batch_of(rows)
        with torch._dynamo.config.patch(error_on_recompile=step > 2):
            assert_same_step(train_step(compiled, batch), exact_step(model, batch), batch["attention_mask"])


def test_the_label_of_a_left_padded_rows_first_token_counts():
    model, batch = tiny_mamba(layers=1), batch_of(LEFT)
    compiled = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True})
    before = compiled(**batch).loss
    batch["labels"][1, 3] = batch["labels"][1, 3] % 31 + 1  # row 1 begins at 3
    after = compiled(**batch).loss
    assert before != after
    torch.testing.assert_close(after, model(**batch).loss, rtol=1e-5, atol=0)


def test_hidden_states_and_tuple_outputs_keep_their_strides():
    model, batch = tiny_mamba(layers=1).eval(), batch_of(RIGHT)
    real = batch["attention_mask"].bool()
    compiled = torch.compile(model, backend="packc", options=DEBUG)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True, return_dict=False)
        actual = compiled(**batch, output_hidden_states=True, return_dict=False)
    for a, b in zip(actual[-1], expected[-1], strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        torch.testing.assert_close(a[real], b[real], rtol=0, atol=1e-5 * b.abs().max().item())


def test_inputs_embeds_get_their_gradient():
    model, batch = tiny_mamba(layers=1), batch_of(LEFT)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    gradients = []
    for each in (model, torch.compile(model, backend="packc", options=DEBUG)):
        leaf = embeds.clone().requires_grad_()
        each(inputs_embeds=leaf, **batch).loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-5 * gradients[0].abs().max().item())


def test_gradient_checkpointing_packs_and_recomputes():
    model, batch = tiny_mamba(), batch_of(RIGHT)
    model.gradient_checkpointing_enable()
    expected = train_step(model, batch)
    compiled = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True})
    assert_same_step(train_step(compiled, batch), expected, batch["attention_mask"])
    with torch.profiler.profile() as profile:
        train_step(compiled, batch)
    scans = {event.key: event.count for event in profile.key_averages()}["packc_cpu::selective_scan"]
    assert scans == 2 * 2  # two layers, forward and again in the backward


def _error(actual, exact):
    return max(((actual[name].double() - exact[name]).abs().max() / exact[name].abs().max()).item() for name in exact)


@the_first_now
def test_autocast_is_no_further_from_fp64_than_twice_eagers_own_error(family):
    model, batch = FAMILIES[family](), batch_of(BOTH)
    real = batch["attention_mask"].bool()

    def step(each, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = train_step(each, batch)
        result["logits"] = result["logits"][real]
        return result

    eager = step(model, True)
    packed = step(torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True}), True)
    exact = step(model.double(), False)
    assert {name: value.dtype for name, value in packed.items()} == {name: value.dtype for name, value in eager.items()}
    assert _error(packed, exact) <= 2 * _error(eager, exact)


@the_first_now
def test_a_bf16_model_is_no_further_from_fp64_than_twice_eagers_own_error(family):
    model, batch = FAMILIES[family]().bfloat16(), batch_of(BOTH)
    real = batch["attention_mask"].bool()

    def step(each):
        result = train_step(each, batch)
        result["logits"] = result["logits"][real]
        return result

    eager = step(model)
    packed = step(torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True}))
    exact = step(model.double())
    assert _error(packed, exact) <= 2 * _error(eager, exact)
