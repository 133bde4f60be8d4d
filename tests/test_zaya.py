"""ZAYA has values of the token before, and convolutions behind one padding: it packs whole, as exact as eager."""

import pytest
import torch
import transformers
from harness import BOTH, HOLE, LEFT, RIGHT, batch_of, shaken, train_step
from test_hf_hybrids import DEBUG, assert_as_exact_as_eager

import packc

SIZES = {"vocab_size": 32, "hidden_size": 16, "head_dim": 8, "moe_intermediate_size": 16, "router_hidden_size": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 3, "num_experts_per_tok": 1}


def zaya(*, attention_bias=False):
    torch.manual_seed(0)
    config = transformers.ZayaConfig(
        **SIZES,
        num_hidden_layers=2,
        attention_bias=attention_bias,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = shaken(transformers.ZayaForCausalLM(config)).train()
    model.set_experts_implementation("eager")  # the one that there is in fp64 too
    return model


def without_first_labels(batch):
    """Of left-padded rows, at whose first token somebody would read the position before it."""
    first = batch["attention_mask"].argmax(1)
    batch["labels"][torch.arange(len(first)), first] = -100
    return {**batch, "use_cache": False}


@pytest.mark.slow
@pytest.mark.parametrize("attention_bias", [False, True])
def test_a_training_step_equals_eager(attention_bias, subtests):
    model = zaya(attention_bias=attention_bias)
    compiled = torch.compile(model, backend="packc", options=DEBUG, fullgraph=True)
    for rows in (RIGHT, LEFT, BOTH, HOLE):
        batch = without_first_labels(batch_of(rows))
        with subtests.test(rows=rows):
            assert_as_exact_as_eager(train_step(compiled, batch), model, batch)


def test_all_of_it_packs():
    report = packc.explain(zaya())(**without_first_labels(batch_of(LEFT)))
    assert report.tokens == sum(row.count("1") for row in LEFT)
    assert {mixer.packed for mixer in report.mixers} == {True}
    assert not report.boundaries


def test_nothing_passes_from_document_to_document():
    model, lengths = zaya().eval(), [5, 1, 3, 7]
    compiled = torch.compile(model, backend="packc", options={**DEBUG, "packc.strict": True})
    ids = torch.randint(1, 32, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]

    def logits(ids):
        with torch.no_grad():
            return compiled(ids, position_ids=positions, use_cache=False).logits.split(lengths, 1)

    parts = ids.split(lengths, 1)
    out, alone = logits(ids), [model(part, use_cache=False).logits for part in parts]
    torch.testing.assert_close(out, tuple(alone), rtol=0, atol=1e-5 * max(each.abs().max().item() for each in alone))
    for changed, part in enumerate(parts):
        others = [*parts[:changed], part % 31 + 1, *parts[changed + 1 :]]
        after = logits(torch.cat(others, 1))
        assert [torch.equal(*each) for each in zip(out, after, strict=True)] == [n != changed for n in range(4)]
