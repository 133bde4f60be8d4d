"""Documents into bins of a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put every item, the longest first, into the first bin that has room for it.

    At most 11/9 of the fewest possible bins and one (Johnson, 1973), and close to the fewest where many items are
    short. A tree of maxima over the bins finds each in O(log bins).

    Args:
        lengths: of the items, each from 0 to ``budget``.
        budget: what the lengths in one bin may add up to.

    Returns:
        The bins, as positions in ``lengths``, in the order in which they were opened.
    """
    if not lengths:
        return []
    # Of two bins one is more than half full, or the first would have taken the other's items.
    most = min(len(lengths), 2 * sum(lengths) // budget + 1)
    leaves = 1 << (most - 1).bit_length()
    room = [budget] * (2 * leaves)  # of a bin, or the most of any bin below
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length, at = lengths[item], 1
        while at < leaves:
            at *= 2
            if room[at] < length:
                at += 1
        if at - leaves == len(bins):
            bins.append([])
        bins[at - leaves].append(item)
        room[at] -= length
        while at > 1:
            at //= 2
            left, right = room[2 * at], room[2 * at + 1]
            most_room = left if left > right else right
            if room[at] == most_room:
                break
            room[at] = most_room
    return bins
