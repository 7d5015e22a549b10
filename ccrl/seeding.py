"""One seed, many streams of random numbers that have nothing to do with each other.

An agent and its environment are given the same seed. Two generators seeded with the same number give the same numbers:
what is explored would be what decides the outcome, and every estimate of a gradient would be biased by it. Adding a
constant to the seed does not help for long: the sum is another run's seed. So every owner of a stream derives its seed
from the run's and from the stream's name.
"""

from __future__ import annotations

import operator

import numpy as np
import torch

__all__ = ["named_generator", "restore_generator", "stream_seed"]


def stream_seed(seed: int, name: str) -> int:
    """The seed, in [0, 2^31), of the stream ``name`` among those of ``seed``.

    NumPy's ``SeedSequence`` mixes it from the seed and, as its spawn key, the bytes of the name.

    Raises:
        ValueError: a negative seed.
        TypeError: a seed that is no integer.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed: expected an integer >= 0, got {seed!r}") from None
    if number < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    mixed = np.random.SeedSequence(number, spawn_key=tuple(name.encode())).generate_state(1, np.uint32)
    # 31 bits: environments written in C and NumPy's older generators take no more
    return int(mixed[0]) >> 1


def named_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on ``device`` at the start of the stream ``name`` of ``seed``."""
    return torch.Generator(device).manual_seed(stream_seed(seed, name))


def restore_generator(generator: torch.Generator, state: torch.Tensor) -> None:
    """Go on where ``state`` was taken, in place.

    A state of another kind of device (of a GPU, loaded without one) fits no generator here: a stream that is derived
    from it begins, the same one at every load.
    """
    state = state.cpu()
    if state.shape == generator.get_state().shape:
        generator.set_state(state)
        return
    generator.manual_seed(stream_seed(int.from_bytes(state.numpy().tobytes(), "little"), "another device"))
