"""A stream in chunks gives what it gives in one piece, in the memory of a chunk."""

import gc
import weakref

import pytest
import torch
from mixers import MIXERS, in_dtype
from sharded_work import random_cut
from stream_work import STREAM, model_and_labels, whole_step

import packc
from packc.distributed import in_chunks


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", MIXERS)
def test_any_chunks_of_any_documents(name, recompute):
    mixer = MIXERS[name]
    for seed in range(6):
        cut = random_cut(1, seed)
        inputs = {
            name: x.requires_grad_() for name, x in in_dtype(mixer, mixer.make(1, cut.tokens), torch.float64).items()
        }
        state = torch.randn(cut.documents, *mixer.state, dtype=torch.float64, requires_grad=True)
        streams = mixer.per_token()
        weights = {name: x for name, x in inputs.items() if name not in streams}

        def function(*pieces, mixer=mixer, state=state, streams=streams, weights=weights, **how):
            named = dict(zip(streams, pieces, strict=True))
            out, final = mixer.function(
                **named, **weights, **mixer.options, initial_state=state, output_final_state=True, **how
            )
            return out, (final**2).sum(), out.sin().sum()

        pieces = [inputs[name] for name in streams]
        want = function(*pieces, cu_seqlens=torch.tensor(cut.cu_seqlens))
        leaves = [*inputs.values(), state]
        grads = torch.autograd.grad((want[0] ** 2).sum() + want[1] + want[2], leaves)
        for chunk in (1, 3, 100):
            got = in_chunks(function, *pieces, cu_seqlens=cut.cu_seqlens, chunk=chunk, recompute=recompute)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
            found = torch.autograd.grad((got[0] ** 2).sum() + got[1] + got[2], leaves)
            torch.testing.assert_close(found, grads, rtol=1e-10, atol=1e-10)


def test_a_model_and_its_loss():
    model, ids, labels = model_and_labels()
    want, grads = whole_step()
    following = labels.roll(-1, 1)
    following[:, torch.tensor(STREAM[2:]) - 1] = -100

    def loss_of(ids, following, plan):
        logits = model(ids, plan=plan)
        return torch.nn.functional.cross_entropy(logits[0], following[0], ignore_index=-100, reduction="sum")

    loss = in_chunks(loss_of, ids, following, cu_seqlens=STREAM, chunk=4) / (following != -100).sum()
    loss.backward()
    torch.testing.assert_close(loss, want)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])


def test_a_chunk_keeps_nothing_but_its_states():
    made = []

    def function(x, plan):
        inner = x * 2
        made.append(weakref.ref(inner))
        return packc.ops.linear_scan(inner, inner, plan=plan).sum()

    x = torch.rand(1, 40, 3, requires_grad=True)
    total = in_chunks(function, x, cu_seqlens=[0, 40], chunk=10)
    gc.collect()
    assert len(made) == 4
    assert all(each() is None for each in made)
    total.backward()
    assert len(made) == 8


def test_what_cannot_be_cut_is_refused():
    x = torch.rand(1, 8, 2, 3)
    with pytest.raises(NotImplementedError, match="varlen_attention has no state"):
        in_chunks(lambda x, plan: packc.ops.varlen_attention(x, x, x, plan=plan), x, cu_seqlens=[0, 8], chunk=4)
    with pytest.raises(ValueError, match=r"tensors must be \(1, 9, ...\), not \(1, 8, 2, 3\)"):
        in_chunks(lambda x, plan: x, x, cu_seqlens=[0, 9], chunk=4)
    with pytest.raises(ValueError, match="in_chunks: cu_seqlens must rise from 0"):
        in_chunks(lambda x, plan: x, x, cu_seqlens=[1, 8], chunk=4)
