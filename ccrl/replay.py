"""Replay: a ring of transitions on the agent's device; an offline data set is a full ring."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from torch import Generator, Tensor

from ccrl import segments
from ccrl.batched_env import Tree
from ccrl.buffer import space_like
from ccrl.data import Batching, Data, Field, tree_columns, tree_leaves
from ccrl.settings import Count, checked

__all__ = ["Mixture", "Relabel", "ReplayBuffer"]

Relabel = Callable[[Data], Data]
"""Replaces columns of a draw (hindsight goals, augmented states); the ring keeps what happened."""


class ReplayBuffer:
    """The last ``capacity`` transitions ``(obs, action, reward, next_obs, terminated, truncated, alive, ...)``.

    Observations are raw: normalisers move, so they are applied when a draw is evaluated. ``next_obs`` is the true
    successor, also at an episode's end, never the observation after a reset. Position and size are device tensors and
    rows that do not count go to a spare slot, so adding and sampling never wait for the device.

    :param capacity: transitions kept; the oldest are overwritten.
    :param fields: further per-step columns to keep, by the names they have in the rollout.
    :param folder: the columns are memory-mapped files in it, a cache: a checkpoint holds rows of its own. None: memory.
    :raises ValueError: if ``capacity < 1``, a field is per sequence, or ``folder`` is given for another device.
    """

    @checked
    def __init__(
        self,
        capacity: Count,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        fields: tuple[Field, ...] = (),
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ) -> None:
        if any(f.per != "step" for f in fields):
            raise ValueError("ReplayBuffer: a ring of steps has no per-sequence columns; declare the field per step")
        if folder is not None and torch.device(device).type != "cpu":
            raise ValueError(f"ReplayBuffer: a memory map needs device 'cpu', got {device}; drop folder")
        # of a memory map only the shapes are made here
        target, rows = torch.device(device), (capacity + 1,)
        device = torch.device("meta") if folder is not None else target
        columns: dict[str, Tree] = {
            "obs": space_like(observation_space, rows, device),
            "action": space_like(action_space, rows, device),
            "reward": torch.zeros(rows, device=device),
            "next_obs": space_like(observation_space, rows, device),
            "terminated": torch.zeros(rows, dtype=torch.bool, device=device),
            "truncated": torch.zeros(rows, dtype=torch.bool, device=device),
            "alive": torch.zeros(rows, device=device),
        }
        for f in fields:
            columns[f.name] = torch.zeros((*rows, *f.shape), dtype=f.dtype, device=device)
        self._allocate(columns if folder is None else _mapped(columns, folder), capacity, target)

    @property
    def nbytes(self) -> int:
        """Memory, or disk, that the columns take when the ring is full."""
        return sum(x.nbytes for column in self._columns.values() for x in tree_leaves(column))

    def _allocate(self, columns: dict[str, Tree], capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self._columns = columns
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._size = torch.zeros((), dtype=torch.int64, device=device)
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        """Rows that ever came; row i is at slot i % capacity."""
        self._segments: dict[Path, list[dict[str, Any]]] = {}
        """Files of the last checkpoint by folder: rows [start, stop) each."""
        self.refills = False
        """Its owner fills it again where its rows are missing: ``segments.leaving_out`` leaves out no others."""
        self.lost = False
        """Whether it was loaded from a state that had left its rows out; the owner clears this."""
        self._empty = True

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], device: torch.device | str = "cpu") -> ReplayBuffer:
        """A full ring of ``M`` transitions: arrays or tensors ``[M, ...]`` (observations may be dicts of them).

        Needs ``obs, action, reward, next_obs, terminated``; ``truncated`` defaults to False and ``alive`` follows from
        ``terminated``. Other columns are kept. float64 becomes float32.

        :raises ValueError: if a column is missing, lengths differ or there is no row.
        """
        target = torch.device(device)
        missing = {"obs", "action", "reward", "next_obs", "terminated"} - arrays.keys()
        if missing:
            raise ValueError(f"ReplayBuffer.from_arrays: missing columns {sorted(missing)}, got {sorted(arrays)}")
        rows = {k: _tensors(v, target) for k, v in arrays.items()}
        terminated = _tensor(rows["terminated"]).bool()
        truncated = _tensor(rows.get("truncated", torch.zeros_like(terminated))).bool()
        rows |= {"terminated": terminated, "truncated": truncated & ~terminated, "alive": (~terminated).float()}
        for name in ("reward", "terminated", "truncated"):
            if _tensor(rows[name]).dim() != 1:
                raise ValueError(f"ReplayBuffer.from_arrays: {name}: expected a number per row [M], got shape "
                                 f"{tuple(_tensor(rows[name]).shape)}")  # fmt: skip
        capacity = terminated.shape[0]
        if not capacity:
            raise ValueError("ReplayBuffer.from_arrays: expected at least one transition, got none")
        ring = cls.__new__(cls)
        spare = tree_columns(rows, lambda x: torch.zeros((capacity + 1, *x.shape[1:]), dtype=x.dtype, device=target))
        ring._allocate(spare, capacity, target)
        ring.replace(rows)
        return ring

    def __len__(self) -> int:
        """Transitions held (waits for the device)."""
        return int(self._size)

    @property
    def names(self) -> frozenset[str]:
        """Columns of a draw, without the counts."""
        return frozenset(self._columns)

    def rows(self) -> dict[str, Tree]:
        """The transitions held ``[M, ...]`` by column, oldest first, as copies (waits for the device)."""
        total = int(self._total)
        return self._rows(total - len(self), total)

    # -- filling ------------------------------------------------------------------------------------------------------

    def add(self, data: Data) -> None:
        """Append the valid rows of a rollout ``[T, N, ...]`` in time order.

        :raises ValueError: if the rollout has more rows than the ring, or lacks a column.
        """
        rows = {k: data.next_obs() if k == "next_obs" else data[k] for k in self._columns}
        self._write(tree_columns(rows, lambda x: x.reshape(-1, *x.shape[2:])), data["valid"].reshape(-1) > 0)

    def replace(self, rows: Mapping[str, Tree]) -> None:
        """Empty the ring and fill it with ``M <= capacity`` rows ``[M, ...]`` of the same columns (synthetic data)."""
        missing = self._columns.keys() - rows.keys()
        if missing:
            raise ValueError(f"ReplayBuffer.replace: missing columns {sorted(missing)}, got {sorted(rows)}")
        self._position.zero_()
        self._size.zero_()
        self._total.zero_()
        self._empty, self._segments = True, {}
        count = _tensor(rows["reward"]).shape[0]
        self._write({k: rows[k] for k in self._columns}, torch.ones(count, dtype=torch.bool, device=self.device))

    def _write(self, rows: Mapping[str, Tree], keep: Tensor) -> None:
        count = keep.shape[0]
        for name, column in rows.items():
            wrong = [tuple(x.shape) for x in tree_leaves(column) if x.shape[0] != count]
            if wrong:
                raise ValueError(f"ReplayBuffer: expected {count} rows in {name!r}, got shape {wrong[0]}")
        if count > self.capacity:
            raise ValueError(f"ReplayBuffer: {count} rows at once do not fit a ring of {self.capacity}; enlarge it")
        if self.device.type == "cpu" and self._write_side_by_side(rows, keep):
            return
        order = keep.long().cumsum(0)
        # boolean indexing would wait for the device to learn the number of rows
        slot = torch.where(keep, (self._position + order - 1) % self.capacity, self.capacity)
        for name, target in self._columns.items():
            for old, new in zip(tree_leaves(target), tree_leaves(rows[name], target), strict=True):
                _put(old, slot, new.to(old.dtype))
        added = order[-1]
        self._position.copy_((self._position + added) % self.capacity)
        self._size.copy_((self._size + added).clamp_max(self.capacity))
        self._total.add_(added)
        # an accelerator would have to be waited for
        self._empty = self._empty and self.device.type == "cpu" and not bool(added)

    def _write_side_by_side(self, rows: Mapping[str, Tree], keep: Tensor) -> bool:
        """``_write`` where all rows are kept and lie before the ring's end, which only the host knows without waiting;
        False elsewhere. Agents add a row per step, and twenty small kernels took longer than their copies."""
        start, count = int(self._position), len(keep)
        if start + count > self.capacity or not bool(keep.all()):
            return False
        target, source = list[Tensor](), list[Tensor]()
        for name, column in self._columns.items():
            target += [x[start : start + count] for x in tree_leaves(column)]
            source += tree_leaves(rows[name], column)
        torch._foreach_copy_(target, source)
        self._position.fill_((start + count) % self.capacity)
        self._size.fill_(min(int(self._size) + count, self.capacity))
        self._total.add_(count)
        self._empty = self._empty and not count
        return True

    # -- drawing ------------------------------------------------------------------------------------------------------

    def sample(self, spec: Batching, generator: Generator | None, relabel: Relabel | None = None) -> Data:
        """``[1, B]`` transitions drawn uniformly with replacement, ``B = spec.size``; ``relabel`` may replace columns.

        :raises ValueError: for another unit than transitions, size "full", or an empty ring.
        """
        return _batch(self._draw(_size(spec), generator), spec, relabel)

    def _draw(self, count: int, generator: Generator | None) -> dict[str, Tree]:
        if self._empty:
            raise ValueError("ReplayBuffer: the ring is empty; add a rollout before sampling")
        # float64: float32 has too few values to reach every row of a ring of more than 16 million
        uniform = torch.rand(count, generator=generator, dtype=torch.float64, device=self.device)
        index = (uniform * self._size).long()
        return tree_columns(self._columns, lambda x: x.index_select(0, index).unsqueeze(0))

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The rows held, oldest first, as copies; inside ``segments.into`` the names of files that hold them, inside
        ``segments.leaving_out`` none."""
        total, size = int(self._total), len(self)
        state: dict[str, Any] = {"capacity": self.capacity, "total": total, "lost": self.lost}
        if self.refills and segments.left_out():
            return state | {"rows": {}}
        folder = segments.target()
        if folder is None:
            return state | {"rows": self._rows(total - size, total)}
        kept = [s for s in self._segments.get(folder, []) if s["stop"] > total - size]
        start = max(kept[-1]["stop"] if kept else 0, total - size)
        if start < total:
            name = segments.write(folder, f"rows_{start:012d}_{total:012d}", self._rows(start, total))
            kept.append({"name": name, "start": start, "stop": total})
        self._segments = {folder: kept}
        return state | {"segments": [s | {"first": max(s["start"], total - size)} for s in kept]}

    def _rows(self, start: int, stop: int) -> dict[str, Tree]:
        """Rows by their number since the beginning."""
        slots = torch.arange(start, stop, device=self.device) % self.capacity
        return tree_columns(self._columns, lambda x: x.index_select(0, slots))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """:raises ValueError: if columns or the capacity differ."""
        if state["capacity"] != self.capacity:
            raise ValueError(f"ReplayBuffer: expected a capacity of {self.capacity}, got {state['capacity']}")
        rows, total = state["rows"], int(state["total"])
        if rows and rows.keys() != self._columns.keys():
            raise ValueError(f"ReplayBuffer: expected columns {sorted(self.names)}, got {sorted(rows)}")
        size = _tensor(rows["reward"]).shape[0] if rows else 0
        self.lost = size == 0 and (total > 0 or state.get("lost", False))
        total = 0 if self.lost else total  # a memory that is not full begins at slot 0
        slots = torch.arange(total - size, total, device=self.device) % self.capacity
        for name in rows:
            target = self._columns[name]
            for old, new in zip(tree_leaves(target), tree_leaves(rows[name], target), strict=True):
                if old.shape[1:] != new.shape[1:]:
                    raise ValueError(f"ReplayBuffer: {name!r}: expected rows {tuple(old.shape[1:])}, got "
                                     f"{tuple(new.shape[1:])}")  # fmt: skip
                _put(old, slots, new.to(old.device))
        self._total.fill_(total)
        self._position.fill_(total % self.capacity)
        self._size.fill_(size)
        self._empty, self._segments = size == 0, {}


class Mixture:
    """Fixed counts from several rings in one batch: ``Mixture({synthetic: 240, real: 16})``.

    :raises ValueError: if the rings have different columns.
    """

    def __init__(self, counts: Mapping[ReplayBuffer, int]) -> None:
        names = {ring.names for ring in counts}
        if len(names) != 1:
            raise ValueError(f"Mixture: expected rings of equal columns, got {[sorted(n) for n in names]}")
        if min(counts.values()) < 1:
            raise ValueError(f"Mixture: expected positive counts, got {list(counts.values())}")
        self.counts = dict(counts)

    def sample(self, spec: Batching, generator: Generator | None, relabel: Relabel | None = None) -> Data:
        """``[1, B]``, ring after ring; ``spec.size`` must be the sum of the counts."""
        total = sum(self.counts.values())
        if _size(spec) != total:
            raise ValueError(f"Mixture: expected Batching.size {total} (the sum of the counts), got {spec.size}")
        draws = [ring._draw(count, generator) for ring, count in self.counts.items()]
        return _batch({k: _concatenate([d[k] for d in draws]) for k in draws[0]}, spec, relabel)


def _mapped(columns: dict[str, Tree], folder: Path) -> dict[str, Tree]:
    """Zeros of these shapes in files of ``folder``, one per column; files that are there are overwritten."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"folder: expected one that can be made or written, got {folder} ({error.strerror})") from None
    count = itertools.count()

    def make(x: Tensor) -> Tensor:
        path = folder / f"column_{next(count):03d}.map"
        path.unlink(missing_ok=True)
        return torch.from_file(str(path), shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)

    return tree_columns(columns, make)


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _put(rows: Tensor, slots: Tensor, new: Tensor) -> None:
    """``index_copy_``, also of the types of which PyTorch has none."""
    kind = _SIGNED.get(rows.dtype, rows.dtype)
    rows.view(kind).index_copy_(0, slots, new.view(kind))


def _size(spec: Batching) -> int:
    if spec.unit != "transition" or spec.size == "full":
        raise ValueError(f"replay: expected Batching('transition', size=B), got {spec}")
    return int(spec.size)


def _batch(columns: dict[str, Tree], spec: Batching, relabel: Relabel | None) -> Data:
    valid = torch.ones_like(_tensor(columns["reward"]))
    counts = {"valid": valid, "n_valid": valid.sum()}
    # a draw is a copy, so relabelling may replace what are facts in the ring
    data = Data(columns | counts, raw=frozenset(counts), scalars=frozenset({"n_valid"}))
    data.microbatch = spec.microbatch
    return data if relabel is None else relabel(data)


def _concatenate(trees: list[Tree]) -> Tree:
    first = trees[0]
    if isinstance(first, dict):
        return {k: torch.cat([_tensor(t[k]) for t in trees if isinstance(t, dict)], 1) for k in first}
    return torch.cat([_tensor(t) for t in trees], 1)


def _tensors(value: Any, device: torch.device) -> Tree:
    if isinstance(value, Mapping):
        return {k: _tensor(_tensors(v, device)) for k, v in value.items()}
    try:
        tensor = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"ReplayBuffer: expected columns of numbers, got {type(value).__name__}: {error}") from error
    if tensor.dim() == 0:
        raise ValueError(f"ReplayBuffer: expected columns [M, ...], got the number {value!r}")
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _tensor(tree: Tree) -> Tensor:
    assert isinstance(tree, Tensor)
    return tree
