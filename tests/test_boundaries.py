"""Where documents begin, by all that may say so; and which arguments of a call do."""

import pytest
import torch
from harness import RIGHT, batch_of, masks, tiny_mamba
from rows import alone

import packc
from packc.boundaries import Given, starts

DEBUG = {"packc.inner": "aot_eager"}


def begins(name, values, rows, *, around=False):
    real = masks(rows).bool()
    return starts([Given(name, torch.tensor(values), around)], real).begins.int().tolist()


def test_each_way_says_where_documents_begin():
    rows = ["11111", "11111"]
    expected = [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert begins("position_ids", [[0, 1, 0, 1, 2], [3, 4, 5, 6, 6]], rows) == expected
    assert begins("seq_idx", [[0, 0, 7, 7, 7], [1, 1, 1, 1, 0]], rows) == expected
    assert begins("cu_seq_lens_q", [0, 2, 5, 9, 10], rows) == expected
    assert begins("cu_seqlens", [0, 2, 2, 9, 10], rows) == expected
    assert begins("seq_idx", [0, 0, 1, 1, 1], rows) == [[0, 0, 1, 0, 0]] * 2


def test_padding_says_nothing_and_hides_nothing():
    assert begins("position_ids", [[0, 1, 2, 3, 1, 1]], ["111100"]) == [[0] * 6]
    assert begins("position_ids", [[1, 1, 0, 1, 2, 3]], ["001111"]) == [[0] * 6]
    assert begins("position_ids", [[0, 1, 9, 0, 1, 2]], ["110111"]) == [[0, 0, 0, 1, 0, 0]]
    assert begins("seq_idx", [[0, 0, -1, 0, 1, 1]], ["110111"]) == [[0, 0, 0, 0, 1, 0]]


def test_several_positions_a_token():
    """The first axis counts, and the patches of an image share a position."""
    assert begins("position_ids", [[[0, 1, 1, 2]], [[0, 1, 0, 1]]], ["1111"]) == [[0, 0, 0, 0]]
    assert begins("position_ids", [[[0, 1, 0, 1]], [[0, 1, 0, 1]]], ["1111"]) == [[0, 0, 1, 0]]


@pytest.mark.parametrize("shape", [(4, 2), (3, 4, 2), (6, 4), (2, 3, 2, 4)])
def test_positions_that_are_no_row_of_numbers_say_nothing(shape):
    real = torch.ones(3, 4, dtype=torch.bool)
    assert not starts([Given("position_ids", torch.zeros(shape))], real).begins.any()
    with pytest.raises(ValueError, match="does not fit"):
        starts([Given("position_ids", torch.zeros(shape), around=True)], real)


def test_those_that_disagree_are_found_out():
    real = torch.ones(1, 4, dtype=torch.bool)
    positions, plain = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 1, 2, 3]])
    same, other = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1]])

    def found(positions, numbers):
        return starts([Given("position_ids", positions), Given("seq_idx", numbers)], real)

    assert not found(positions, same).disagree
    assert found(positions, other).disagree
    assert not found(plain, other).disagree  # positions that only rise say nothing
    assert found(plain, other).elsewhere
    assert not found(positions, same).elsewhere
    assert found(positions * 3, same).gaps.tolist() == [True]


# ---- arguments of a call ---------------------------------------------------------------------------------------------

PLAIN = torch.arange(8).expand(3, -1).contiguous()
AGAIN = torch.cat([torch.arange(3), torch.arange(5)]).expand(3, -1).contiguous()


def logits_alone(model, ids):
    return torch.cat([model(input_ids=ids[:, :3]).logits, model(input_ids=ids[:, 3:]).logits], 1)


@pytest.mark.parametrize("masked", [False, True])
def test_positions_that_start_again_in_a_later_batch_are_heeded_without_a_recompilation(masked):
    model = tiny_mamba()
    fast = torch.compile(model, backend=packc.backend, options=DEBUG)
    ids = torch.randint(1, 32, (3, 8))
    given = {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if masked else {})}
    torch.testing.assert_close(fast(**given, position_ids=PLAIN).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = fast(**given, position_ids=AGAIN).logits
    torch.testing.assert_close(out, logits_alone(model, ids), rtol=1e-4, atol=1e-4)


def test_an_argument_that_comes_later_is_heeded():
    model = tiny_mamba()
    fast = torch.compile(model, backend=packc.backend, options=DEBUG)
    ids = torch.randint(1, 32, (3, 8))
    fast(ids)
    seq_idx = (torch.arange(8) >= 3).expand(3, -1).int()
    torch.testing.assert_close(fast(ids, seq_idx=seq_idx).logits, logits_alone(model, ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="disagree"):
        fast(ids, seq_idx=seq_idx, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]).repeat(3, 1))


def test_offsets_that_the_model_itself_reads_are_its_own_business():
    taps = torch.randn(4, 2)

    def by_hand(x, cu_seqlens):
        return packc.ops.causal_conv1d(x, taps, cu_seqlens=cu_seqlens)

    x, cu_seqlens = torch.randn(1, 9, 4), torch.tensor([0, 4, 9])
    fast = torch.compile(by_hand, backend=packc.backend, options=DEBUG)
    torch.testing.assert_close(fast(x, cu_seqlens), by_hand(x, cu_seqlens))
    with packc.documents(cu_seqlens=cu_seqlens), pytest.raises(packc.NotPacked, match="already packed"):
        fast(x, cu_seqlens)


def test_boundaries_of_each_sequence_are_its_own():
    """Of two sequences in a graph the one is packed; boundaries of the other raise, for its mixers know none."""
    model = tiny_mamba()

    def both(chosen, rejected):
        return model(**chosen).logits, model(**rejected).logits

    ids = torch.randint(1, 32, (3, 8))

    def batch(position_ids):
        return {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids), "position_ids": position_ids}

    options = {**DEBUG, "packc.mask": "chosen.attention_mask"}
    fast = torch.compile(both, backend=packc.backend, options=options)
    fast(batch(PLAIN), batch(PLAIN.clone()))
    with torch._dynamo.config.patch(error_on_recompile=True):
        chosen, rejected = fast(batch(AGAIN), batch(PLAIN.clone()))
        torch.testing.assert_close(chosen, logits_alone(model, ids), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rejected, model(ids).logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(packc.NotPacked, match="documents of another sequence"):
            fast(batch(PLAIN), batch(AGAIN))


def test_two_boundaries_of_one_sequence_must_agree():
    model = tiny_mamba()
    ids = torch.randint(1, 32, (3, 8))

    def both(one, other):
        return model(**one).logits, model(**other).logits

    fast = torch.compile(both, backend=packc.backend, options=DEBUG)
    same = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fast({**same, "position_ids": AGAIN}, {**same, "position_ids": AGAIN.clone()})
    with pytest.raises(ValueError, match="disagree"):
        fast({**same, "position_ids": AGAIN}, {**same, "position_ids": PLAIN})


def test_attention_alone_is_up_to_its_mask_where_it_is_not_packed():
    """Stock's own mask may keep documents apart, of which packc knows nothing here; said once, strict raises."""

    def model(x, position_ids, mask):
        x = x + position_ids[..., None] + x.cumsum(1)
        return torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask)[:, 0]

    given = torch.randn(1, 8, 4), AGAIN[:1], torch.ones(1, 1, 8, 8).tril().bool()
    fast = torch.compile(model, backend=packc.backend, options=DEBUG)
    with pytest.warns(UserWarning, match="up to the model's attention masks"):
        torch.testing.assert_close(fast(*given), model(*given))
    with packc.documents(position_ids=AGAIN[:1]), pytest.raises(packc.NotPacked, match="runs padded"):
        fast(*given)


def test_a_batch_of_a_tokenizer_is_looked_into():
    batch = batch_of(RIGHT)
    model = tiny_mamba()
    fast = torch.compile(lambda batch: model(**batch).logits, backend=packc.backend, options=DEBUG)
    del batch["labels"]
    real = batch["attention_mask"].bool()
    plain = fast({**batch, "position_ids": PLAIN})
    torch.testing.assert_close(plain[real], model(**batch).logits[real], rtol=1e-4, atol=1e-4)
    again = fast({**batch, "position_ids": AGAIN})
    want = logits_alone(model, batch["input_ids"])
    torch.testing.assert_close(again[real], want[real], rtol=1e-4, atol=1e-4)


# ---- arguments that the graph is not given ---------------------------------------------------------------------------


def scan(x):
    return packc.ops.linear_scan(torch.sigmoid(x), x)


def reads_none(x, seq_idx=None):
    return scan(x)


def takes_any(x, **given):
    return scan(x)


def behind_a_break(x, seq_idx=None):
    x = x * 1.0
    torch._dynamo.graph_break()
    return scan(x)


@pytest.mark.parametrize("function", [reads_none, takes_any, behind_a_break])
def test_documents_that_a_function_hands_on_to_nobody_are_kept_apart(function):
    fast = torch.compile(function, backend=packc.backend, options=DEBUG)
    x, seq_idx = torch.randn(1, 4, 2), torch.tensor([[0, 0, 1, 1]])
    torch.testing.assert_close(fast(x), scan(x))
    torch.testing.assert_close(fast(x, seq_idx=seq_idx), alone(scan, x, [[2, 2]]))
    torch.testing.assert_close(fast(x), scan(x))


def test_documents_in_a_batch_of_which_a_function_reads_the_tokens_alone_are_kept_apart():
    fast = torch.compile(lambda batch: scan(batch["x"]), backend=packc.backend, options=DEBUG)
    x, seq_idx = torch.randn(1, 4, 2), torch.tensor([[0, 0, 1, 1]])
    torch.testing.assert_close(fast({"x": x}), scan(x))
    torch.testing.assert_close(fast({"x": x, "seq_idx": seq_idx}), alone(scan, x, [[2, 2]]))


@pytest.mark.parametrize("name", ["seq_idx", "position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("broken", [True, False])
def test_blocks_that_get_no_boundaries_keep_the_documents_of_their_model_apart(name, broken):
    model = tiny_mamba()
    ids = torch.randint(1, 32, (1, 8))
    plain, want = model(ids).logits, logits_alone(model, ids)
    fast = model
    if broken:  # as hooks of FSDP2 break it
        for layer in model.backbone.layers:
            layer.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        fast = torch.compile(model, backend=packc.backend, options=DEBUG)
    else:
        for layer in model.backbone.layers:
            layer.compile(backend=packc.backend, options=DEBUG)
    given = {"seq_idx": AGAIN[:1].eq(0).cumsum(1), "position_ids": AGAIN[:1], "cu_seq_lens_q": torch.tensor([0, 3, 8])}
    torch.testing.assert_close(fast(ids).logits, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast(ids, **{name: given[name]}).logits, want, rtol=1e-4, atol=1e-4)


def convolved(x, mask=None):
    """By no op of packc's; with a mask, what attention sees through it too."""
    y = torch.nn.functional.conv1d(x.mT, torch.ones(2, 1, 3), padding=2, groups=2)[..., : x.shape[1]].mT
    return y if mask is None else torch.nn.functional.scaled_dot_product_attention(*[y[:, None]] * 3, mask)[:, 0]


class Around(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = torch.compile(convolved, backend=packc.backend, options=DEBUG)

    def forward(self, x, seq_idx=None, mask=None):
        return self.block(x, mask)


def test_blocks_with_a_convolution_of_their_own_keep_them_apart_too():
    x, seq_idx = torch.randn(1, 4, 2), torch.tensor([[0, 0, 1, 1]])
    model = Around()
    torch.testing.assert_close(model(x), convolved(x))
    torch.testing.assert_close(model(x, seq_idx), alone(convolved, x, [[2, 2]]))


def test_blocks_with_a_convolution_of_their_own_that_cannot_raise():
    x, seq_idx, mask = torch.randn(1, 4, 2), torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 1, 4, 4).bool()
    model = Around()
    torch.testing.assert_close(model(x, mask=mask), convolved(x, mask))
    with pytest.raises(packc.NotPacked, match="seq_idx"):
        model(x, seq_idx, mask)


@pytest.mark.parametrize(("rows", "length"), [(1, 2), (2, 2), (2, 5)])
def test_a_module_around_a_block_is_looked_at_whatever_it_calls_itself(rows, length):
    block = torch.compile(lambda x: scan(x), backend=packc.backend, options=DEBUG)

    class Model(torch.nn.Module):
        def forward(model, x, **given):  # noqa: N805
            return block(x)

    x, seq_idx = torch.randn(rows, length, 2), (torch.arange(length) > 0).int().expand(rows, -1)
    torch.testing.assert_close(Model()(x, seq_idx=seq_idx), alone(scan, x, [[1, length - 1]] * rows))


def test_what_is_recomputed_outside_of_its_model_does_not_forget_its_documents():
    block = torch.compile(lambda x: scan(x), backend=packc.backend, options=DEBUG)

    class Model(torch.nn.Module):
        def forward(self, x, seq_idx):
            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    x, seq_idx = torch.randn(1, 4, 2, requires_grad=True), torch.tensor([[0, 0, 1, 1]])
    out = Model()(x, seq_idx)
    torch.testing.assert_close(out, alone(scan, x, [[2, 2]]))
    with pytest.raises(packc.NotPacked, match="recomputed in a backward"):
        out.sum().backward()
    with packc.documents(seq_idx=seq_idx):
        Model()(x, seq_idx).sum().backward()
    (want,) = torch.autograd.grad(alone(scan, x, [[2, 2]]).sum(), x)
    torch.testing.assert_close(x.grad, want)


def test_a_checkpoint_in_a_compiled_block_keeps_the_documents_of_its_model_apart():
    model = tiny_mamba().train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(1, 32, (1, 8))
    logits_alone(model, ids).square().sum().backward()
    want = [p.grad for p in model.parameters()]
    model.zero_grad()
    for layer in model.backbone.layers:
        layer.compile(backend=packc.backend, options=DEBUG)
    model(ids, position_ids=AGAIN[:1]).logits.square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], want, rtol=1e-4, atol=1e-4)
