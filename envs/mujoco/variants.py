"""Domain randomisation: episodes are played on models that differ, drawn from a fixed set of variants of the task's.

The set is drawn once, on the host, with the constants that ``mj_setConst`` derives; an episode draws one of its
members. So a step costs a copy of the changed fields at most, every engine plays the same models, and any field of
MjModel can be changed.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mujoco
import numpy as np
from mujoco.batch import MODEL_FIELDS

from ccrl.seeding import stream_seed
from ccrl.settings import Above, ConfigError, Count, Natural, checked

__all__ = ["Randomise", "Variants", "asked_variants", "draw_variants"]

Randomise = Mapping[str, tuple[float, float]] | Callable[[mujoco.MjModel, np.random.Generator], None]
"""What differs: ranges of factors by field, such as ``{"geom_friction": (0.5, 1.5)}``, one factor per model, uniform,
for all entries of the field and of those joined to it by a plus sign (``"body_mass+body_inertia"``); or a function that
changes the copy of the model that it is given."""

UNSAFE = ("opt.timestep", "opt.integrator", "opt.cone", "opt.solver")
"""Fields that the environment or an engine reads once, for all copies."""


@dataclass(frozen=True)
class Variants:
    """``count`` models of the same sizes."""

    count: int
    values: dict[str, np.ndarray]
    """The fields that differ, by MjModel's names (those of MjOption as ``opt.gravity``): ``[count, ...]`` each, with
    the constants that MuJoCo derives."""
    changed: tuple[str, ...]
    """Those that ``randomise`` changed, without the derived ones."""
    models: tuple[mujoco.MjModel, ...]


def asked_variants(
    model: mujoco.MjModel, randomise: Randomise | None, models: int | None, models_seed: int | None
) -> Variants | None:
    """What an environment's options of these names ask for.

    :raises ValueError: options that nothing would read, and as :func:`draw_variants`.
    """
    if randomise is None:
        if models is not None or models_seed is not None:
            raise ValueError(f"models, models_seed: expected none without randomise, got {models} and {models_seed}")
        return None
    return draw_variants(model, randomise, 64 if models is None else models, models_seed or 0)


@checked
def draw_variants(model: mujoco.MjModel, randomise: Randomise, count: Count, seed: Natural) -> Variants:
    """``count`` variants of ``model``.

    :raises ValueError: a field that there is not, that cannot differ between copies, or nothing differs.
    """
    rng = np.random.default_rng(stream_seed(seed, "models"))
    scales = _scales(model, randomise) if isinstance(randomise, Mapping) else None
    models = []
    base = {name: _read(model, name) for name in MODEL_FIELDS}
    changed: set[str] = set()
    derived: set[str] = set()
    for _ in range(count):
        variant = copy.copy(model)
        if scales is None:
            assert callable(randomise)
            randomise(variant, rng)
        else:
            for names, (low, high) in scales.items():
                factor = rng.uniform(low, high)
                for name in names:
                    _write(variant, name, _read(variant, name) * factor)
        changed |= _differing(base, variant)
        mujoco.mj_setConst(variant, mujoco.MjData(variant))
        derived |= _differing(base, variant)
        models.append(variant)
    if not changed:
        raise ValueError(f"randomise: expected changes of the model, got none in {count} draws")
    unsafe = sorted(changed.intersection(UNSAFE))
    if unsafe:
        raise ValueError(f"randomise: expected fields that may differ between copies, got {unsafe}")
    values = {name: np.stack([_read(m, name) for m in models]) for name in sorted(changed | derived)}
    return Variants(count, values, tuple(sorted(changed)), tuple(models))


def _scales(
    model: mujoco.MjModel, ranges: Mapping[str, tuple[float, float]]
) -> dict[tuple[str, ...], tuple[float, float]]:
    scales = {}
    for key, (low, high) in ranges.items():
        low, high = Above(0).check(f"randomise: {key}", low), Above(0).check(f"randomise: {key}", high)
        names = tuple(key.split("+"))
        for name in names:
            if name not in MODEL_FIELDS or _read(model, name).dtype.kind != "f":
                near = difflib.get_close_matches(name, MODEL_FIELDS, n=3)
                raise ConfigError(f"randomise: expected real fields of MjModel, got {name!r}; near ones: {near}")
            if not _read(model, name).any():
                raise ConfigError(f"randomise: {name} is 0 in this model, factors change nothing; give a function")
        if low > high:
            raise ConfigError(f"randomise: expected low <= high, got {key}: ({low}, {high})")
        scales[names] = (low, high)
    return scales


def _read(model: mujoco.MjModel, name: str) -> np.ndarray:
    owner, _, field = name.rpartition(".")
    return np.array(getattr(model.opt if owner else model, field))


def _write(model: mujoco.MjModel, name: str, value: np.ndarray) -> None:
    owner, _, field = name.rpartition(".")
    if owner:  # its numbers are Python's
        setattr(model.opt, field, value if value.ndim else float(value))
    else:
        getattr(model, field)[...] = value


def _differing(base: dict[str, np.ndarray], model: mujoco.MjModel) -> set[str]:
    return {name for name, value in base.items() if not np.array_equal(value, _read(model, name))}
