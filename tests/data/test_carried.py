"""Documents longer than a batch come in pieces, and what a recurrence knows at the end of one reaches the next."""

import pytest
import torch
from torch.utils.data import DataLoader

import packc
from packc.data import CarryingBatchSampler, PackingCollator, Pieces, carried

LENGTHS = torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_token_comes_once_in_order(world_size):
    sampler = CarryingBatchSampler(LENGTHS, 48, 16, window=10, rank=0, world_size=world_size)
    steps = list(sampler.steps())
    assert all(sum(p.stop - p.start for p in pieces) <= 48 and pieces for step in steps for pieces in step)
    seen = {}
    for number, step in enumerate(steps):
        for rank, pieces in enumerate(step):
            for piece in pieces:
                if piece.start == 0 and piece.document in seen:
                    continue  # a rank that has nothing left is given some again
                before = seen.get(piece.document, 0)
                assert piece.start == before
                if before:
                    last = steps[number - 1][rank][piece.continues]
                    assert (last.document, last.stop) == (piece.document, piece.start)
                else:
                    assert piece.continues == -1
                seen[piece.document] = piece.stop
    assert seen == dict(enumerate(LENGTHS))


def test_batches_are_full_while_there_are_documents():
    lengths = [1 + n % 100 for n in range(3000)]
    steps = list(CarryingBatchSampler(lengths, 256, 64, rank=0, world_size=2).steps())[:-10]
    tokens = sum(p.stop - p.start for step in steps for pieces in step for p in pieces)
    assert tokens > 0.99 * 256 * 2 * len(steps)


def test_it_goes_on_where_it_was():
    make = lambda: CarryingBatchSampler(LENGTHS, 48, 16, rank=1, world_size=2)  # noqa: E731
    sampler = make()
    whole = list(make())
    iterator = iter(sampler)
    first = [next(iterator) for _ in range(5)]
    other = make()
    other.load_state_dict(sampler.state_dict())
    assert first + list(other) == whole
    assert list(other) != whole  # of the next epoch
    with pytest.raises(ValueError, match="another sampler"):
        CarryingBatchSampler(LENGTHS, 64, 16, rank=1, world_size=2).load_state_dict(sampler.state_dict())


@pytest.mark.parametrize(("budget", "longest"), [(8, 9), (8, 0)])
def test_pieces_fit_into_batches(budget, longest):
    with pytest.raises(ValueError, match="longest must be"):
        CarryingBatchSampler(LENGTHS, budget, longest)


def test_a_recurrence_on_pieces_is_that_on_documents():
    table = torch.randn(50, 3, dtype=torch.float64)
    documents = [{"input_ids": torch.randint(50, (length,))} for length in LENGTHS]
    loader = DataLoader(
        Pieces(documents),
        batch_sampler=CarryingBatchSampler(LENGTHS, 48, 16),
        collate_fn=PackingCollator("flat", cu_seq_lens=True),
    )
    found, states, under_way = {}, None, []
    for batch in loader:
        x, offsets = table[batch["input_ids"]], batch["cu_seq_lens_q"]
        initial = carried(states, batch["continues"])
        out, states = packc.ops.linear_scan(
            x.sigmoid(), x, cu_seqlens=offsets, initial_state=initial, output_final_state=True
        )
        ids = batch["input_ids"][0].split(offsets.diff().tolist())
        parts = out[0].split(offsets.diff().tolist())
        under_way = [
            (under_way[n][0] + [i], under_way[n][1] + [o]) if n >= 0 else ([i], [o])
            for n, i, o in zip(batch["continues"].tolist(), ids, parts, strict=True)
        ]
        found |= {tuple(torch.cat(i).tolist()): torch.cat(o) for i, o in under_way}
        assert batch["labels"][0, offsets[:-1].long()].eq(-100).all()
    for document in documents:
        x = table[document["input_ids"]][None]
        want = packc.ops.linear_scan(x.sigmoid(), x)[0]
        torch.testing.assert_close(found[tuple(document["input_ids"].tolist())], want)
