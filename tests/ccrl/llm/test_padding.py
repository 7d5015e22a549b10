"""Buckets of completions of similar length."""

from __future__ import annotations

import pytest
import torch

from ccrl.llm.padding import MOST, buckets


def present(*lengths: int, width: int = 10) -> torch.Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def test_short_completions_are_apart_from_long_ones_where_that_saves_enough() -> None:
    """Sorted 1 2 2 3 | 9 9 10 10 in steps of two: a cut below the last two saves (10 - 9) * 6 = 6 tokens; one in the
    middle then (9 - 3) * 4 = 24, or 28 without the first; one above the first two (3 - 2) * 2 = 2."""
    rows = present(9, 1, 2, 10, 3, 9, 2, 10)
    for least, expected in ((28, [3, 10]), (6, [3, 9, 10]), (2, [2, 3, 9, 10])):
        found = buckets(rows, least)
        assert [longest for _, longest in found] == expected
        assert sorted(found[-1][0].tolist()) == ([0, 3, 5, 7] if least == 28 else [3, 7])  # type: ignore[union-attr]
    assert buckets(rows, 29) == [(None, 10)]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_every_row_is_in_one_bucket_that_holds_it(count: int) -> None:
    lengths = torch.randint(0, 11, (count,), generator=torch.Generator().manual_seed(count))
    found = buckets(present(*lengths.tolist()), 1)
    assert len(found) <= MOST
    order = torch.cat([torch.arange(count) if rows is None else rows for rows, _ in found])
    assert sorted(order.tolist()) == list(range(count))
    for rows, longest in found:
        here = lengths if rows is None else lengths[rows]
        assert longest == max(1, int(here.max()))


def test_replies_count_and_an_empty_batch_of_tokens_is_one_long() -> None:
    gap = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]])
    assert buckets(gap, 10**9) == [(None, 3)]
    assert buckets(torch.zeros(2, 4, dtype=torch.int64), 1) == [(None, 1)]
