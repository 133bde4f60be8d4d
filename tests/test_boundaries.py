"""Boundaries that the caller hands over are not honoured yet: that is said where they matter, and strict raises."""

import warnings

import pytest
import torch
from harness import RIGHT, batch_of, masks, tiny_mamba

import packc
from packc.boundaries import start_again

DEBUG = {"packc.inner": "aot_eager"}


def said(call, *args, **kwargs) -> list[str]:
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        call(*args, **kwargs)
    return [str(each.message) for each in seen if "document boundaries" in str(each.message)]


def flattened() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(1, 32, (1, 9)),
        "position_ids": torch.cat([torch.arange(4), torch.arange(5)])[None],
    }


GIVEN = {
    "seq_idx": {"seq_idx": torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32)},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32)},
    "position_ids": {},
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("masked", [False, True])
def test_what_a_flattening_collator_hands_over_is_named(name, masked):
    batch = {**flattened(), **GIVEN[name]}
    if masked:
        batch["attention_mask"] = torch.ones(1, 9, dtype=torch.int64)
    fast = torch.compile(tiny_mamba(), backend=packc.backend, options=DEBUG)
    assert any(name in text for text in said(fast, **batch))


def test_positions_that_start_again_in_a_later_batch_are_seen_without_a_recompilation():
    fast = torch.compile(tiny_mamba(), backend=packc.backend, options=DEBUG)
    for with_mask in (True, False):
        torch._dynamo.reset()
        batch = batch_of(RIGHT)
        del batch["labels"]
        if not with_mask:
            del batch["attention_mask"]
        plain = torch.arange(8).expand(3, -1).contiguous()
        again = torch.cat([torch.arange(3), torch.arange(5)]).expand(3, -1).contiguous()
        assert not said(fast, **batch, position_ids=plain)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert len(said(fast, **batch, position_ids=again)) == 1
            assert not said(fast, **batch, position_ids=again)


def test_strict_raises():
    options = {**DEBUG, "packc.strict": True}
    batch = batch_of(RIGHT)
    fast = torch.compile(tiny_mamba(), backend=packc.backend, options=options)
    fast(**batch, position_ids=torch.arange(8).expand(3, -1).contiguous())
    again = torch.cat([torch.arange(3), torch.arange(5)]).expand(3, -1).contiguous()
    with pytest.raises(packc.NotPacked, match="position_ids"):
        fast(**batch, position_ids=again)
    with pytest.raises(Exception, match="seq_idx"):
        fast(**batch, seq_idx=torch.zeros(3, 8, dtype=torch.int32))


def test_positions_on_padding_say_nothing():
    positions = torch.tensor([[0, 1, 2, 3, 1, 1], [1, 1, 0, 1, 2, 3]])
    real = masks(["111100", "001111"]).bool()
    assert not start_again(positions, real).any()
    assert start_again(positions).all()
    assert start_again(torch.tensor([0, 0])).all()
    assert not start_again(torch.tensor([[[0, 1, 1, 2]], [[0, 1, 0, 1]]])).any()


def test_offsets_that_the_model_itself_reads_are_its_own_business():
    taps = torch.randn(4, 2)

    def by_hand(x, cu_seqlens):
        return packc.ops.causal_conv1d(x, taps, cu_seqlens=cu_seqlens)

    x, cu_seqlens = torch.randn(1, 9, 4), torch.tensor([0, 4, 9])
    fast = torch.compile(by_hand, backend=packc.backend, options=DEBUG)
    assert not said(fast, x, cu_seqlens)
    torch.testing.assert_close(fast(x, cu_seqlens), by_hand(x, cu_seqlens))


def test_positions_of_every_sequence_are_looked_at():
    model = tiny_mamba()

    def both(chosen, rejected):
        return model(**chosen).logits, model(**rejected).logits

    def batch(positions):
        given = batch_of(RIGHT)
        return {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], "position_ids": positions}

    plain = torch.arange(8).expand(3, -1).contiguous()
    again = torch.cat([torch.arange(3), torch.arange(5)]).expand(3, -1).contiguous()
    fast = torch.compile(both, backend=packc.backend, options=DEBUG)
    assert not said(fast, batch(plain), batch(plain.clone()))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert said(fast, batch(plain), batch(again))
