"""Seeds of single copies from the seed of a run."""

from __future__ import annotations

import numpy as np

__all__ = ["copy_seeds"]


def copy_seeds(seed: int, n: int) -> list[int]:
    """``n`` seeds in [0, 2^31) for the copies of one environment, mixed from ``seed`` by NumPy's ``SeedSequence``.

    Not ``seed + i``, Gymnasium's and SB3's habit: runs with the seeds 0 and 1 would share ``n - 1`` of their ``n``
    environment streams, and an average over neighbouring seeds would be one over hardly more than one run.

    Raises:
        ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    # 31 bits: environments written in C and NumPy's older generators take no more
    return [int(x) >> 1 for x in np.random.SeedSequence(seed).generate_state(n, np.uint32)]
