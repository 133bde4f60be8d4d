"""A model's loss is in the graph of the model."""

import torch
from harness import RIGHT, batch_of
from transformers import GPT2Config, GPT2LMHeadModel

CONFIG = GPT2Config(
    vocab_size=32,
    n_embd=16,
    n_layer=1,
    n_head=2,
    n_positions=16,
    bos_token_id=0,
    eos_token_id=0,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(CONFIG)


def loss_of(model, inputs, **how):
    return torch.compile(model, **how)(**inputs).loss


def test_a_loss_that_the_class_does_not_name_packs_with_its_model(packc_backend):
    model, inputs = tiny_gpt2(), batch_of(RIGHT)
    expected = model(**inputs).loss
    torch.testing.assert_close(loss_of(model, inputs, backend=packc_backend, fullgraph=True), expected)
    strict = {"packc.strict": True, "packc.inner": "eager"}
    torch.testing.assert_close(loss_of(model, inputs, backend="packc", options=strict), expected)


def test_a_loss_of_the_users_own_stays_it(packc_backend):
    model, inputs = tiny_gpt2(), batch_of(RIGHT)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    expected = model(**inputs).loss
    torch.testing.assert_close(loss_of(model, inputs, backend=packc_backend, fullgraph=True), expected)


def test_other_backends_break_their_graph_as_before(other_backend):
    loss_of(tiny_gpt2(), batch_of(RIGHT), backend=other_backend)
    assert len(other_backend.graphs) == 2
