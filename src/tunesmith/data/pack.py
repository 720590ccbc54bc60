"""Which rows share a pack: first-fit decreasing, so that packs are as full as can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit-decreasing bin packing (Johnson, 1973): at most 11/9 of the fewest packs possible, plus one.

    Rows in decreasing order of length, each into the first pack that still has room; a row longer than ``capacity``
    has a pack of its own. Time n log n: a tree over the packs holds the largest room below each node.

    Args:
        lengths: tokens of each row.
        capacity: tokens that a pack holds.

    Returns:
        Row numbers of each pack, packs in the order in which they were opened, rows of a pack in decreasing length.

    Example:
        ``pack([5, 7, 5, 2, 4], 10) == [[1, 3], [0, 2], [4]]``
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    leaves = 1
    while leaves < len(order):
        leaves *= 2
    room = [capacity] * (2 * leaves)
    packs: list[list[int]] = []
    for row in order:
        length = min(lengths[row], capacity)
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        if node - leaves == len(packs):
            packs.append([])
        packs[node - leaves].append(row)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs
