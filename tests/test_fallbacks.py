"""What cannot be packed exactly runs as it was, in the same compiled graph where it can, and says why."""

import contextlib
import warnings

import pytest
import torch
from harness import HOLE, RIGHT, assert_same_step, batch_of, exact_step, masks, tiny_mamba, train_step

import packc

DEBUG = {"packc.inner": "aot_eager"}


def compiled(model, **options):
    return torch.compile(model, backend="packc", options={**DEBUG, **{f"packc.{k}": v for k, v in options.items()}})


def test_a_hole_in_a_row_runs_right_in_the_same_graph_with_one_warning():
    model = tiny_mamba()
    fast = compiled(model)
    fast(**batch_of(RIGHT))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, times in ((batch_of(HOLE), 1), (batch_of(HOLE), 0)):
            with pytest.warns(UserWarning, match="1 of 3 rows padded: padding between") if times else _no_warning():
                actual = train_step(fast, batch)
            assert_same_step(actual, exact_step(model, batch), batch["attention_mask"])


@contextlib.contextmanager
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_live_label_on_padding_runs_right_with_a_warning():
    model, batch = tiny_mamba(), batch_of(RIGHT)
    batch["labels"] = batch["input_ids"].clone()
    with pytest.warns(UserWarning, match="2 of 3 rows padded: a label"):
        actual = train_step(compiled(model), batch)
    assert_same_step(actual, exact_step(model, batch), torch.ones(3, 8))


@pytest.mark.parametrize("rows", [["00000000"] * 2, ["00000000", "00010000"]])
def test_no_token_and_one_token_run_in_the_graph_of_many(rows):
    model = tiny_mamba()
    fast = compiled(model, strict=True)
    first, batch = batch_of(RIGHT[:2]), batch_of(rows)
    del first["labels"], batch["labels"]
    fast(**first)
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual, expected = fast(**batch).logits, model(**batch).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_without_a_mask_the_mixers_are_packcs_and_nothing_is_packed():
    model, batch = tiny_mamba(), batch_of(RIGHT)
    del batch["attention_mask"]
    report = packc.explain(model)(**batch)
    assert [mixer.packed for mixer in report.mixers] == [False] * 4
    assert report.tokens is None
    assert "mask" in report.fallback
    assert_same_step(train_step(compiled(model), batch), exact_step(model, batch), torch.ones(3, 8))


def test_one_position_per_row_is_not_packed():
    model, batch = tiny_mamba(), batch_of(["1", "1"])
    del batch["labels"]
    torch.testing.assert_close(compiled(model)(**batch).logits, model(**batch).logits)


def test_strict_raises_for_a_graph_that_cannot_be_packed():
    model, batch = tiny_mamba(), batch_of(RIGHT)
    del batch["attention_mask"]
    with pytest.raises(Exception, match="packc cannot pack this graph: no \\(B, L\\) padding mask"):
        compiled(model, strict=True)(**batch)


def test_strict_raises_for_a_batch_that_cannot_be_packed():
    fast = compiled(tiny_mamba(), strict=True)
    fast(**batch_of(RIGHT))
    with pytest.raises(packc.NotPacked, match="padding between tokens"):
        fast(**batch_of(HOLE))


def test_strict_may_be_turned_on_for_the_process():
    fast = compiled(tiny_mamba())
    fast(**batch_of(RIGHT))
    with packc.config.patch(strict=True), pytest.raises(packc.NotPacked):
        fast(**batch_of(HOLE))


def test_left_padding_that_a_mixer_reads_stays_in():
    taps = torch.randn(4, 3)

    def unmasked(x, attention_mask):
        y = packc.ops.causal_conv1d(x, taps)
        return (y * attention_mask[..., None]).sum()

    x, mask = torch.randn(2, 6, 4), masks(["000111", "111100"])
    fast = torch.compile(unmasked, backend="packc", options=DEBUG)
    with pytest.warns(UserWarning, match="1 of 2 rows padded: .*x is not masked"):
        actual = fast(x, mask)
    torch.testing.assert_close(actual, unmasked(x, mask))
    report = packc.explain(unmasked)(x, mask)
    assert (report.tokens, report.padded_tokens) == (6 + 4, 12)
    assert "left padding" in report.fallback


def test_final_states_keep_right_padding_in():
    taps = torch.randn(4, 3)

    def with_state(x, mask):
        return packc.ops.causal_conv1d(x * mask[..., None], taps, output_final_state=True)

    x, mask = torch.randn(2, 6, 4), masks(["000111", "111100"])
    with pytest.warns(UserWarning, match="1 of 2 rows padded: .*state after right padding"):
        out, state = torch.compile(with_state, backend="packc", options=DEBUG)(x, mask)
    expected_out, expected_state = with_state(x, mask)
    torch.testing.assert_close(out[mask.bool()], expected_out[mask.bool()])
    torch.testing.assert_close(state, expected_state)


def test_a_mistake_in_a_pass_leaves_the_graph_unpacked_and_says_so(monkeypatch):
    def broken(graph):
        raise AssertionError("a mistake")

    monkeypatch.setattr(packc.pipeline, "FIND", (broken, *packc.pipeline.FIND[1:]))
    model, batch = tiny_mamba(), batch_of(RIGHT)
    with pytest.warns(UserWarning, match="please report this: AssertionError"):
        actual = train_step(compiled(model), batch)
    assert_same_step(actual, exact_step(model, batch), batch["attention_mask"])
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a mistake"):
        compiled(model, strict=True)(**batch)
