"""What DataCollatorWithFlattening makes of a batch, without any padding: where stock leaks or raises, nothing leaks."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from rows import alone, numbers, offsets, positions

import packc

sys.path.insert(0, str(Path(__file__).parent / "frontends"))
from tiny_models import tiny_model

DEBUG = {"packc.inner": "aot_eager", "packc.strict": True}
LEAKS = ("mamba", "falcon_mamba", "mamba2", "jamba")
RAISES = ("bamba", "granitemoehybrid", "falcon_h1", "zamba2", "nemotron_h")
QUICK = ("mamba", "mamba2", "bamba")  # whose mixers the others' are
LENGTHS = [10, 14]
OTHER = [3, 12, 1, 8]


def flattened(ids, lengths=LENGTHS):
    """The collator's own, but for the ids."""
    from transformers import DataCollatorWithFlattening

    parts = ids[0].split(lengths)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    return {**collate([{"input_ids": part.tolist()} for part in parts]), "use_cache": False}


def changed(ids, document):
    start, end = offsets(LENGTHS)[document : document + 2]
    other = ids.clone()
    other[:, start:end] = other[:, start:end] % 31 + 1
    return other


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in (*LEAKS, *RAISES)]
)
def test_nothing_leaks_from_document_to_document(family):
    model = tiny_model(family)
    fast = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    ids = torch.randint(1, 32, (1, sum(LENGTHS)))
    with torch.no_grad():
        out = fast(**flattened(ids)).logits
        want = alone(lambda part: model(part, use_cache=False).logits, ids, [LENGTHS])
        torch.testing.assert_close(out, want, rtol=0, atol=1e-5 * want.abs().max().item())
        for document, (mine, theirs) in enumerate(((slice(10), slice(10, None)), (slice(10, None), slice(10)))):
            after = fast(**flattened(changed(ids, document))).logits
            assert torch.equal(after[:, theirs], out[:, theirs])
            assert not torch.equal(after[:, mine], out[:, mine])


@pytest.mark.parametrize("family", LEAKS)
def test_stock_leaks(family):
    """Or the test above would prove nothing."""
    model, ids = tiny_model(family), torch.randint(1, 32, (1, 24))
    with torch.no_grad():
        leak = model(**flattened(ids)).logits - model(**flattened(changed(ids, 0))).logits
    assert leak[:, 10:].abs().max() > 0


def losses_and_gradients(model, call):
    loss = call(model)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix("_orig_mod.")] = parameter.grad.clone()
    model.zero_grad()
    return found


def loss_flattened(ids, lengths):
    return lambda model: model(**flattened(ids, lengths)).loss


def loss_alone(ids, lengths):
    """The mean over the tokens of all documents, each by itself."""

    def call(model):
        parts = [part for part in ids.split(lengths, 1) if part.shape[1] > 1]
        losses = [model(part, labels=part, use_cache=False).loss * (part.shape[1] - 1) for part in parts]
        return sum(losses) / sum(part.shape[1] - 1 for part in parts)

    return call


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family == "bamba" else pytest.mark.slow) for family in (*LEAKS, *RAISES)],
)
def test_a_training_step_is_that_of_the_documents_alone(family):
    model = tiny_model(family).train()
    exact = copy.deepcopy(model).double()
    fast = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    fast.gradient_checkpointing_enable()
    for step, lengths in enumerate((LENGTHS, OTHER, [4] * 6)):
        ids = torch.randint(1, 32, (1, sum(lengths)))
        # Offsets have a size that varies, and one that varies is compiled for once more.
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            got = losses_and_gradients(fast, loss_flattened(ids, lengths))
        want = losses_and_gradients(exact, loss_alone(ids, lengths))
        eager = losses_and_gradients(model, loss_alone(ids, lengths))
        assert got.keys() == want.keys()
        for name, value in want.items():
            scale = value.abs().max().item()
            if scale == 0:
                continue
            error, of_eager = ((x[name].double() - value).abs().max().item() / scale for x in (got, eager))
            assert error <= max(1e-5, 2 * of_eager), name


def test_other_documents_compile_nothing_new():
    model = tiny_model("mamba2")
    fast = torch.compile(model, backend="packc", options=DEBUG)
    for step, lengths in enumerate((LENGTHS, OTHER, [24], [1] * 24)):
        ids = torch.randint(1, 32, (1, 24))
        with torch._dynamo.config.patch(error_on_recompile=step > 0), torch.no_grad():
            out = fast(ids, position_ids=positions([lengths]), use_cache=False).logits
            want = alone(lambda part: model(part, use_cache=False).logits, ids, [lengths])
        torch.testing.assert_close(out, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_documents_around_a_call_need_no_arguments():
    model = tiny_model("bamba")
    fast = torch.compile(model, backend="packc", options=DEBUG)
    ids = torch.randint(1, 32, (1, 24))
    with torch.no_grad(), packc.documents(cu_seqlens=offsets(LENGTHS)):
        out = fast(ids, use_cache=False).logits
        want = alone(lambda part: model(part, use_cache=False).logits, ids, [LENGTHS])
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_a_model_of_attention_alone_takes_what_it_does_not_read():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    fast = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    ids, seq_idx = torch.randint(1, 32, (1, 24)), numbers([LENGTHS])
    with torch.no_grad():
        out = fast(ids, seq_idx=seq_idx, use_cache=False).logits
        want = alone(lambda part: model(part, use_cache=False).logits, ids, [LENGTHS])
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5 * want.abs().max().item())
