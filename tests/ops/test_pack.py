"""pack and unpack: each other's inverse on tokens, each other's backward, on every kernel."""

from types import SimpleNamespace

import pytest
import torch
from budget import skip_if_interpreted
from harness import LEFT, RIGHT, masks
from hypothesis import given, settings
from hypothesis import strategies as st

import packc
from packc.ops import causal_conv1d, cpu_library, dispatch, pack, packing_index, unpack
from packc.ops.pack import op
from packc.ops.tritonsrc.launch import interpreted

MASK = ["0110", "1111", "0000"]


def places():
    return masks(MASK).flatten().nonzero().flatten()


INDEX = places()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64])
@pytest.mark.parametrize("trailing", [(), (5,), (2, 3)])
def test_tokens_survive_the_way_there_and_back(kernels, dtype, trailing):
    x, index = torch.randint(0, 2, (3, 4, *trailing)).to(dtype), places()
    packed = pack(x, index)
    back = unpack(packed, index, 3, 4)
    assert packed.shape == (1, len(index), *trailing)
    assert packed.equal(x.flatten(0, 1)[index][None])
    assert back.flatten(0, 1)[index].equal(packed[0])
    assert back.sum() == packed.sum()  # nothing anywhere else
    assert (back.dtype, back.shape, back.is_contiguous()) == (x.dtype, x.shape, True)


VIEWS = {
    "axes swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of each row": lambda x: torch.cat([x, x], 1)[:, 1 : 1 + x.shape[1]],
    "part of each token": lambda x: torch.cat([x, x], 2)[..., 1 : 1 + x.shape[2]],
    "every other element": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "channel-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_inputs(kernels, view):
    x, index = torch.randn(3, 4, 6), places()
    strided = VIEWS[view](x)
    assert not strided.is_contiguous()
    assert pack(strided, index).equal(pack(strided.contiguous(), index))
    packed = VIEWS[view](pack(x, index))
    assert unpack(packed, index, 3, 4).equal(unpack(packed.contiguous(), index, 3, 4))


@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("trailing", [(), (0,), (1100,)])
def test_sizes_around_those_of_blocks(kernels, tokens, trailing):
    if trailing == (1100,) and tokens < 300:
        skip_if_interpreted(kernels)
    x, index = torch.randn(2, 200, *trailing), torch.randperm(400)[:tokens]
    packed = pack(x, index)
    assert packed.equal(x.flatten(0, 1)[index][None])
    expected = torch.zeros_like(x).flatten(0, 1).index_copy(0, index, packed[0]).view_as(x)
    assert unpack(packed, index, 2, 200).equal(expected)


def test_bits_are_copied(kernels):
    """A NaN keeps its payload."""
    bits, index = torch.tensor([[0x7FC01234, -0x3FEDCC, 1, 0x7F812345]], dtype=torch.int32), torch.tensor([3, 1, 0])
    packed = pack(bits.view(torch.float32), index)
    assert packed.view(torch.int32).equal(bits[:, index])
    assert unpack(packed, index, 1, 4).view(torch.int32)[:, index].equal(bits[:, index])


def test_offsets_past_two_to_the_31_elements(kernels):
    """Of a tensor whose 2 GiB are reserved, and touched where it has elements only."""
    far = torch.empty_strided((2, 3, 2), (2**31 + 8, 2**20, 1), dtype=torch.uint8)
    far.copy_(torch.randint(0, 256, far.shape))
    index = torch.arange(6)
    if kernels in ("reference", "cpu"):
        pytest.skip("these flatten batch and length first")
    assert pack(far, index).equal(far.reshape(1, 6, 2))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_kernels_agree_for_any_tokens(data):
    batch, length, width = (data.draw(st.integers(1, 6)) for _ in range(3))
    index = torch.tensor(data.draw(st.lists(st.integers(0, batch * length - 1), unique=True)), dtype=torch.int64)
    x = torch.randn(batch, length, width)
    results = []
    for kernels in ("cpu", "reference", *(["triton"] if interpreted() else [])):
        with packc.config.patch(kernels=kernels):
            packed = pack(x, index)
            results.append((packed, unpack(packed, index, batch, length)))
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def test_gradients(kernels):
    x, index = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True), places()
    assert torch.autograd.gradcheck(lambda x: pack(x, index), x)
    y = torch.randn(1, len(index), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: unpack(y, index, 3, 4), y)


def test_backwards_return_one_gradient_for_each_input():
    saved = SimpleNamespace(saved_tensors=(INDEX,), batch=3, length=4)
    for name, grad in (("pack", torch.ones(1, len(INDEX))), ("unpack", torch.ones(3, 4))):
        grads = getattr(op, f"_{name}_backward")(saved, grad)
        assert len(grads) == len(getattr(torch.ops.packc, name).default._schema.arguments)


def test_opcheck(kernels):
    x, index = torch.randn(3, 4, 2, requires_grad=True), places()
    torch.library.opcheck(torch.ops.packc.pack.default, (x, index))
    torch.library.opcheck(torch.ops.packc.unpack.default, (pack(x, index).detach().requires_grad_(), index, 3, 4))
    torch.library.opcheck(torch.ops.packc.packing_index.default, (masks(MASK),))
    torch.library.opcheck(torch.ops.packc.row_ends.default, (torch.tensor([1, 2, 5, 8]), 3, 3, 2))
    torch.library.opcheck(torch.ops.packc.in_chunks.default, (torch.tensor([0, 2, 2, 6], dtype=torch.int32), 6, 2))
    torch.library.opcheck(torch.ops.packc.positions.default, (torch.arange(6), 3))
    torch.library.opcheck(torch.ops.packc.counted_anew.default, (torch.arange(6), torch.tensor([0, 2, 2, 3, 6]), 3))


def test_forced_kernels_that_are_not_there_raise(monkeypatch):
    x = torch.ones(3, 4, dtype=torch.int64)
    with packc.config.patch(kernels="triton"), monkeypatch.context() as patch:
        patch.setattr(dispatch, "interpreted", lambda: False)
        with pytest.raises(ValueError, match="only under TRITON_INTERPRET=1"):
            pack(x, INDEX)
    monkeypatch.setattr(cpu_library, "_load_all", lambda: {"pack": "no compiler"})
    with packc.config.patch(kernels="cpu"):
        for call in (lambda: pack(x, INDEX), lambda: unpack(x[:1, :1], INDEX[:1], 3, 4)):
            with pytest.raises(RuntimeError, match="pack did not build: no compiler"):
                call()
    assert pack(x, INDEX).equal(x.flatten()[INDEX][None])


# ---- packing by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [RIGHT, LEFT, MASK, ["000", "000"], ["1"]])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_packing_index_is_where_the_tokens_are(rows, dtype):
    index, cu_seqlens = packing_index(masks(rows).to(dtype))
    assert (index.dtype, cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert index.tolist() == [i for i, c in enumerate("".join(rows)) if c == "1"]
    assert cu_seqlens.tolist() == [sum(row.count("1") for row in rows[:b]) for b in range(len(rows) + 1)]


def test_every_document_is_counted_as_if_it_were_the_first_of_its_row():
    """Rows of 5: one padded on the left with documents of 2 and 1, an empty one, one of 1, 3 and 1."""
    index = torch.tensor([2, 3, 4, 10, 11, 12, 13, 14])
    cu_seqlens = torch.tensor([0, 2, 3, 3, 4, 7, 7, 8])
    counted = torch.ops.packc.counted_anew(index, cu_seqlens, 5)
    assert counted.tolist() == [2, 3, 0, 10, 10, 11, 12, 10]
    whole = torch.tensor([0, 3, 3, 8])
    assert torch.ops.packc.counted_anew(index, whole, 5).equal(index)


@pytest.mark.parametrize("lengths", [[7, 0, 3, 1], [3, 6], [0, 0], [1] * 5])
def test_chunks_of_documents_are_as_many_as_there_may_be(lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    begins = [start + at for start, n in zip(cu_seqlens.tolist(), lengths, strict=False) for at in range(0, n, 3)]
    tokens = sum(lengths)
    chunks = torch.ops.packc.in_chunks(cu_seqlens, tokens, 3)
    assert chunks.dtype == torch.int32
    assert chunks.tolist() == begins + [tokens] * (len(lengths) + tokens // 3 + 1 - len(begins))


def test_packing_by_hand_compiles_once_for_any_number_of_tokens():
    weight = torch.randn(5, 4, requires_grad=True)

    def step(x, mask):
        index, cu_seqlens = packing_index(mask)
        mixed = causal_conv1d(pack(x, index), weight, activation="silu", cu_seqlens=cu_seqlens)
        return unpack(mixed, index, *mask.shape)

    compiled = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for i, rows in enumerate((["0111", "1111"], ["0001", "0011"], ["0000", "0000"], ["1111", "1111"])):
            x, mask = torch.randn(2, 4, 5, requires_grad=True), masks(rows)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                results = compiled(x, mask)
            expected = step(x, mask)
            torch.testing.assert_close(results, expected)
            dout = torch.randn_like(expected)
            torch.testing.assert_close(
                *(torch.autograd.grad(result, (x, weight), dout) for result in (results, expected))
            )


def test_errors_name_the_argument_and_the_shapes():
    with pytest.raises(ValueError, match=r"x must be \(B, L, ...\), got shape \(3,\)"):
        pack(torch.ones(3), INDEX)
    with pytest.raises(ValueError, match=r"index must be int64 of shape \(T,\), got torch.float32 of shape \(2, 2\)"):
        pack(torch.ones(3, 4), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"x must be \(1, T, ...\) with T = 6 as in index, got shape \(1, 5\)"):
        unpack(torch.ones(1, 5), INDEX, 3, 4)
    with pytest.raises(ValueError, match=r"mask must be \(B, L\), bool or int, got torch.float32 of \(3, 4\)"):
        packing_index(torch.ones(3, 4))
    with packc.config.patch(kernels="cpu"), pytest.raises(IndexError, match="is not a place in 8 tokens"):
        pack(torch.ones(2, 4), torch.tensor([8]))


@pytest.mark.parametrize("order", ["ascending", "any", "twice"])
def test_unpack_on_cpu_writes_zero_where_no_token_goes(order):
    index = {"ascending": [1, 2, 5], "any": [5, 0, 2], "twice": [2, 2, 4]}[order]
    x = torch.randn(1, 3, 5)
    places = torch.tensor(index)
    for _ in range(8):
        torch.full((1, 7, 5), float("nan"))  # what the allocator hands out next
        with packc.config.patch(kernels="cpu"):
            actual = packc.ops.unpack(x, places, 1, 7)
        torch.testing.assert_close(actual[0], torch.zeros(7, 5).index_copy(0, places, x[0]), rtol=0, atol=0)
