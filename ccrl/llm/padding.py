"""Completions of similar length together: less of what is evaluated is padding."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, arange

__all__ = ["MOST", "buckets"]

MOST = 4
"""Buckets of a batch."""


def buckets(present: Tensor, least: int) -> list[tuple[Tensor | None, int]]:
    """Rows ``[b]`` of completions of similar length and the length of the longest, from the shortest bucket to the
    longest. At most ``MOST``, cut where a cut saves at least so many tokens; one bucket of all rows is ``None``.

    :param present: ``[B, T]``, 1 where a completion has a token.
    :param least: tokens; what one more pass costs.
    """
    count, width = present.shape
    ends, order = (present * arange(1, width + 1, device=present.device)).amax(1).sort()
    lengths: list[int] = ends.clamp_min(1).tolist()
    edges, step = [count], -(-count // MOST)
    for start in range(count - step, 0, -step):
        if (lengths[edges[-1] - 1] - lengths[start - 1]) * start >= least:
            edges.append(start)
    edges = [0, *reversed(edges)]
    if len(edges) == 2:
        return [(None, lengths[-1])]
    return [(order[a:b], lengths[b - 1]) for a, b in pairwise(edges)]
