"""Minari data sets (0.5): read without the network, and written from whole episodes without JAX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ccrl.offline.arrays import from_arrays
from ccrl.offline.dataset import Array, DataError, Dataset
from ccrl.packages import require

__all__ = ["flatten_observation", "load_minari", "write_minari"]


def load_minari(name: str) -> Dataset:
    """A data set under Minari's root (``MINARI_DATASETS_PATH``, else ``~/.minari/datasets``); nothing is downloaded.

    Minari keeps ``T + 1`` observations of an episode of ``T`` steps, so every row has its true successor, at time-outs
    too. Of observations with a goal, ``observation`` and ``desired_goal`` are put side by side.

    :raises DataError: it is not there, or has spaces that are no vectors.
    """
    minari = require("minari", "offline")
    try:
        source = minari.load_dataset(name, download=False)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"minari:{name}: expected a data set under Minari's root, found none ({error}); fetch it with "
            f"'minari download {name}', or make one with scripts/make_dataset.py"
        ) from error
    parts: dict[str, list[Array]] = {}
    for number, episode in enumerate(source.iterate_episodes()):
        obs = flatten_observation(f"minari:{name}: episode {number}", episode.observations)
        steps = len(episode.rewards)
        if len(obs) != steps + 1:
            raise DataError(f"minari:{name}: episode {number}: expected {steps + 1} observations, got {len(obs)}")
        columns = {
            "obs": obs[:-1], "next_obs": obs[1:], "action": np.asarray(episode.actions), "reward": episode.rewards,
            "terminated": episode.terminations, "truncated": episode.truncations,
            "episode": np.full(steps, number),
        }  # fmt: skip
        for key, value in columns.items():
            parts.setdefault(key, []).append(np.asarray(value))
    joined = {k: np.concatenate(v) for k, v in parts.items()}
    metadata = source.storage.metadata
    pair = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    scores = (float(pair[0]), float(pair[1])) if pair[0] is not None and pair[1] is not None else None
    return from_arrays(joined, f"minari:{name}", scores)


def flatten_observation(where: str, obs: Any) -> Array:
    """``[T, S]`` from an array ``[T, ...]`` or a dict with ``observation`` and ``desired_goal``."""
    if isinstance(obs, Mapping):
        keys = [k for k in ("observation", "desired_goal") if k in obs] if "observation" in obs else list(obs)
        return np.concatenate([flatten_observation(where, obs[k]) for k in keys], -1)
    array = np.asarray(obs)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where}: expected observations of numbers, got {array.dtype}")
    return array.reshape(len(array), -1)


def write_minari(
    name: str,
    episodes: Iterable[Mapping[str, Array]],
    env: Any,
    *,
    scores: tuple[float, float] | None = None,
    **metadata: Any,
) -> Any:
    """Write whole episodes as the Minari data set ``name`` (``mine/hopper-medium-v0``); returns Minari's object.

    :param episodes: each with ``obs [T + 1, S]``, ``action [T, A]``, ``reward [T]``, ``terminated [T]``, ``truncated
        [T]``.
    :param env: a Gymnasium environment with these spaces (its spec is stored), or an id.
    :param scores: returns of the random policy and of the expert.
    :param metadata: of Minari's ``create_dataset_from_buffers`` (``author``, ``description``, ``algorithm_name``).
    :raises DataError: an episode of other lengths, or without an end.
    """
    minari = require("minari", "offline")
    buffer_of = require("minari.data_collector", "offline").EpisodeBuffer
    buffers = []
    for number, e in enumerate(episodes):
        steps = len(e["reward"])
        lengths = {k: len(v) for k, v in e.items()}
        wrong = {k: n for k, n in lengths.items() if n != steps + (k == "obs")}
        if wrong or not steps:
            raise DataError(f"{name}: episode {number}: expected {steps} rows ({steps + 1} of 'obs'), got {lengths}")
        truncated = np.asarray(e["truncated"], dtype=bool).copy()
        if not (e["terminated"][-1] or truncated[-1]):
            raise DataError(f"{name}: episode {number}, row {steps - 1}: expected terminated or truncated at its end")
        buffers.append(buffer_of(
            id=number, observations=np.asarray(e["obs"], np.float32), actions=np.asarray(e["action"]),
            rewards=np.asarray(e["reward"], np.float64).tolist(), truncations=truncated.tolist(),
            terminations=np.asarray(e["terminated"], dtype=bool).tolist(), infos={},
        ))  # fmt: skip
    if scores is not None:
        metadata |= {"ref_min_score": scores[0], "ref_max_score": scores[1]}
    options = {"eval_env": None, "author": "ccrl", "author_email": "none", "code_permalink": "none"} | metadata
    return minari.create_dataset_from_buffers(dataset_id=name, buffer=buffers, env=env, **options)
