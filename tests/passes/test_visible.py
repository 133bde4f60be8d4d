"""What tokens are seen to see has the name that ``varlen_attention`` gives it, or none."""

import pytest
import torch

from packc.passes.visible import Band, Other, Pairs

L = 6
DISTANCE = torch.arange(L)[:, None] - torch.arange(L)
REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
KEYS = REAL[:, None, None, :]


def band_of(*masks):
    pairs = Pairs()
    assert all(pairs.add(mask & KEYS, REAL) for mask in masks)
    return pairs.band()


@pytest.mark.parametrize(
    ("visible", "band"),
    [
        (DISTANCE >= 0, Band(True)),
        (DISTANCE > -L, Band(False)),
        ((DISTANCE >= 0) & (DISTANCE < 3), Band(True, 3)),
        (DISTANCE == 0, Band(True, 1)),
        (DISTANCE <= 0, Other.TOKENS),
        (DISTANCE < 3, Other.TOKENS),
        (DISTANCE > 0, Other.TOKENS),
        (DISTANCE.abs() < 3, Band(False, 3)),
        ((DISTANCE < 2) & (DISTANCE > -4), Other.TOKENS),
        ((DISTANCE >= 0) & (DISTANCE != 2), Other.TOKENS),
        ((DISTANCE >= 0) & (torch.arange(L) > 0), Other.TOKENS),
        (torch.stack([DISTANCE >= 0, DISTANCE == 0]), Other.TOKENS),
    ],
)
def test_a_band_is_recognised(visible, band):
    assert band_of(visible) == band


def test_two_tries_must_agree():
    assert band_of(DISTANCE >= 0, (DISTANCE >= 0) & (DISTANCE < 3)) == Other.TOKENS


def test_what_is_seen_must_be_seen_in_full():
    mask = torch.zeros(1, 1, L, L).masked_fill(DISTANCE < 0, -torch.inf)
    pairs = Pairs()
    assert pairs.add(torch.where(KEYS, mask, -torch.inf), REAL)
    assert pairs.band() == Band(True)
    assert pairs.add(torch.where(KEYS, mask - 1, -torch.inf), REAL)
    assert pairs.band() == Other.TOKENS


def test_padding_that_is_seen_is_told():
    assert not Pairs().add(torch.ones(1, 1, L, L, dtype=torch.bool), REAL)
