"""Rows of experience: the rollout buffer, the overlay that estimators derive columns in, and minibatches.

One layout for a cart-pole step and a language-model token: time-major ``[T, N, ...]``, per-sequence columns
``[N, ...]``. A buffer stores facts; everything computed from them lives in a ``Data`` overlay. Episode ends are two
gamma-free masks, computed once at collection:

* ``alive``: 0 after a termination, else 1 (is there a value after this step?);
* ``carry``: 0 on the last step of every episode and on invalid rows, else 1 (does row t+1 continue row t?).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Generator, Tensor

from ccrl.batched_env import Tree

if TYPE_CHECKING:
    from ccrl.successors import Successors

__all__ = [
    "Batching", "Data", "Field", "Unit", "masked", "masked_mean", "masked_sum", "tree_columns",
    "tree_leaves", "tree_map",
]  # fmt: skip

Unit = Literal["transition", "sequence", "group"]


class Field(NamedTuple):
    """A raw column declared by an environment, a policy or an estimator."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    per: Literal["step", "sequence"] = "step"


@dataclass(frozen=True)
class Batching:
    """How a phase cuts the data into optimiser batches."""

    unit: Unit = "transition"
    """What is shuffled and never split: a step, a whole column, or all columns of a group."""
    size: int | Literal["full"] = 64
    """Units per optimiser batch; "full" is one batch of everything."""
    epochs: int = 1
    microbatch: int | None = None
    """Columns per forward pass; gradients of the pieces add up to the whole batch's exactly. With unit "group" a piece
    is at least one whole group."""

    def __post_init__(self) -> None:
        if self.unit not in ("transition", "sequence", "group"):
            raise ValueError(f"Batching.unit: expected transition, sequence or group, got {self.unit!r}")
        if self.size != "full" and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"Batching.size: expected a positive integer or 'full', got {self.size!r}")
        if self.epochs < 1 or (self.microbatch is not None and self.microbatch < 1):
            raise ValueError(f"Batching: expected epochs, microbatch >= 1, got {self.epochs}, {self.microbatch}")


def tree_map(fn: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Apply ``fn`` to a tensor or to every tensor of a dict."""
    return {k: fn(v) for k, v in tree.items()} if isinstance(tree, dict) else fn(tree)


def tree_leaves(tree: Tree, like: Tree | None = None) -> list[Tensor]:
    """The tensors of ``tree``, in the order of ``like`` (another tree with the same keys; None: its own)."""
    if isinstance(tree, dict):
        return [tree[k] for k in (tree if like is None else like)]
    return [tree]


def masked(x: Tensor, valid: Tensor) -> Tensor:
    """``x`` where valid, else 0: chosen, not multiplied, because what padding holds may be infinite or NaN."""
    return torch.where(valid > 0, x, torch.zeros_like(x))


def masked_sum(x: Tensor, valid: Tensor) -> Tensor:
    """``[1, B]``: over the valid steps of ``x [T, B]``."""
    return masked(x, valid).sum(0, keepdim=True)


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """``[1, B]``: over the valid steps of ``x [T, B]``; 0 where there is none."""
    return masked_sum(x, valid) / valid.sum(0, keepdim=True).clamp_min(1.0)


class Data(Mapping[str, Tree]):
    """Named columns: raw ones shared with the buffer and never overwritten, derived ones its own.

    ``[T, N, ...]`` per step; names in ``sequence`` are ``[N, ...]``; names in ``scalars`` are 0-d facts about the
    whole optimiser batch (``n_valid, n_sequences, n_groups``).
    """

    def __init__(
        self,
        columns: Mapping[str, Tree],
        *,
        raw: frozenset[str] | None = None,
        sequence: frozenset[str] = frozenset(),
        scalars: frozenset[str] = frozenset(),
        successors: Successors | None = None,
    ) -> None:
        self._columns = dict(columns)
        self.raw = frozenset(columns) if raw is None else raw
        self.sequence, self.scalars, self._successors = sequence, scalars, successors
        self.microbatch: int | None = None
        """Columns per forward pass that the batching asked for; updaters that can split a batch obey it."""

    def __getitem__(self, name: str) -> Tensor:  # observations may be dicts; everything else is a tensor
        try:
            return self._columns[name]  # type: ignore[return-value]
        except KeyError:
            raise KeyError(f"no column {name!r}; there are {sorted(self._columns)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def shape(self) -> tuple[int, int]:
        """``(T, N)``."""
        valid = self["valid"]
        return valid.shape[0], valid.shape[1]

    def derive(self, **columns: Tree) -> Data:
        """A new overlay with more (or replaced) derived columns ``[T, N, ...]``. Raw columns are refused."""
        clash = self.raw & columns.keys()
        if clash:
            raise ValueError(f"derive: {sorted(clash)} are raw columns (facts); choose other names for derived ones")
        return self._with(self._columns | columns)

    def derive_sequence(self, **columns: Tensor) -> Data:
        """As ``derive`` for per-sequence columns ``[N, ...]``."""
        data = self.derive(**columns)
        data.sequence = self.sequence | columns.keys()
        return data

    def with_raw(self, **columns: Tree) -> Data:
        """With more raw columns ``[T, N, ...]``: facts that the collector adds to a buffer's."""
        data = self._with(self._columns | columns)
        data.raw = self.raw | columns.keys()
        return data

    def with_scalars(self, **scalars: Tensor) -> Data:
        """With more 0-d facts about the whole batch (a temperature, a statistic of an earlier phase)."""
        data = self._with(self._columns | scalars)
        data.scalars = self.scalars | scalars.keys()
        return data

    def _with(self, columns: Mapping[str, Tree], successors: bool = True) -> Data:
        data = Data(
            columns,
            raw=self.raw,
            sequence=self.sequence,
            scalars=self.scalars,
            successors=self._successors if successors else None,
        )
        data.microbatch = self.microbatch
        return data

    def keep(self, names: Iterable[str]) -> Data:
        """Only these columns (those of them that there are): a shuffle then gathers nothing that is not read."""
        return self._with({k: self._columns[k] for k in names if k in self._columns})

    def take(self, columns: Tensor) -> Data:
        """Keep (or repeat) whole columns: ``columns`` is an int64 index into N. ``next_obs`` does not survive it."""
        return self._with({k: self._take(k, v, columns) for k, v in self._columns.items()}, successors=False)

    def _take(self, name: str, value: Tree, columns: Tensor) -> Tree:
        if name in self.scalars:
            return value
        dim = 0 if name in self.sequence else 1
        return tree_map(lambda x: x.index_select(dim, columns), value)

    # -- episode ends -----------------------------------------------------------------------------------------------

    def discount(self, gamma: float, time_limit: Literal["bootstrap", "terminal"] = "bootstrap") -> Tensor:
        """``gamma * alive`` ``[T, N]``: the factor of the successor's value. The only place that decides what a time
        limit means: ``terminal`` treats it as a termination (reproduces older code, biased)."""
        discount = gamma * self["alive"]
        if time_limit == "bootstrap":
            return discount
        if time_limit == "terminal":
            return torch.where(self["truncated"], torch.zeros_like(discount), discount)
        raise ValueError(f"discount: expected time_limit 'bootstrap' or 'terminal', got {time_limit!r}")

    def next_obs(self) -> Tree:
        """The true successor of every row, ``[T, N, ...]``: ``obs[1:]`` with the final observations patched in."""
        if "next_obs" in self:  # rows without neighbours (replay, data sets) store it
            return self["next_obs"]
        return self.successors.obs()

    def state_values(self, fn: Callable[[Tree], Tensor]) -> tuple[Tensor, Tensor]:
        """``(V(o_t), V(x_t))``, both ``[T, N, ...]``, with every distinct state evaluated once.

        ``fn`` maps observations ``[K, ...]`` to ``[K, ...]``.
        """
        return self.successors.values(fn)

    @property
    def successors(self) -> Successors:
        """What lies after every row.

        :raises ValueError: for anything but a whole rollout.
        """
        if self._successors is None:
            raise ValueError(
                "successor observations exist on whole rollouts only; derive what you need before batching"
            )
        return self._successors

    # -- minibatches ------------------------------------------------------------------------------------------------

    def minibatches(self, spec: Batching, generator: Generator | None) -> Iterator[Data]:
        """One epoch of shuffled batches ``[T', B, ...]`` of one static shape (the last one padded with ``valid = 0``).

        The shuffle gathers every column once per epoch; batches are then views of it. ``size="full"`` does not
        shuffle. Transitions become ``[1, B]``; sequences ``[T, B]``; groups ``[T, B]`` with ``group`` relabelled
        ``0..G-1``.
        """
        yield from self.epoch(spec, generator)

    def epoch(self, spec: Batching, generator: Generator | None) -> list[Data]:
        """The batches of ``minibatches`` as a list."""
        cut = {
            "transition": self._transition_batches,
            "sequence": self._sequence_batches,
            "group": self._group_batches,
        }
        batches = cut[spec.unit](spec.size, generator)
        for batch in batches:
            batch.microbatch = spec.microbatch
        return batches

    def whole(self, spec: Batching) -> Data:
        """Everything as one batch of ``spec.unit``, in micro-batches no wider than ``spec``'s batches of sequences."""
        (batch,) = self.epoch(replace(spec, size="full"), None)
        if spec.microbatch is None and spec.unit != "transition" and spec.size != "full":
            groups = int(batch["n_groups"]) if spec.unit == "group" else batch.shape[1]
            batch.microbatch = -(-batch.shape[1] * spec.size // groups)
        return batch

    def _transition_batches(self, size: int | str, generator: Generator | None) -> list[Data]:
        steps, width = self.shape
        total = steps * width
        columns: dict[str, Tree] = {}
        for name, value in self._columns.items():
            if name in self.sequence:
                value = tree_map(lambda x: x.expand(steps, *x.shape), value)
            if name not in self.scalars:
                columns[name] = tree_map(lambda x: x.reshape(total, *x.shape[2:]), value)
        if size == "full":
            batches = [tree_columns(columns, lambda x: x.unsqueeze(0))]
            counts: Sequence[Tensor | None] = (None,)
        else:
            size = min(int(size), total)
            count = -(-total // size)
            order = torch.randperm(total, generator=generator, device=self["valid"].device)
            if count * size > total:  # the tail repeats the first rows with valid = 0: one shape, one compile
                order = torch.cat([order, order[: count * size - total]])
            shuffled = tree_columns(columns, lambda x: x.index_select(0, order).view(count, 1, size, *x.shape[1:]))
            if count * size > total:
                shuffled["valid"].view(-1)[total:] = 0.0  # type: ignore[union-attr]
            # one unbind per column: an indexing call per column and batch cost more than the gathers
            pieces = [_unbind(column) for column in shuffled.values()]
            batches = [dict(zip(shuffled, row)) for row in zip(*pieces)]
            valid = shuffled["valid"]
            assert isinstance(valid, Tensor)
            counts = valid.sum((1, 2)).unbind()
        return [self._batch(b, n_sequences=None, n_valid=n) for b, n in zip(batches, counts)]

    def _sequence_batches(self, size: int | str, generator: Generator | None) -> list[Data]:
        width = self.shape[1]
        device = self["valid"].device
        if size == "full":
            return [self._batch(self._columns, n_sequences=width)]
        static = min(int(size), width)
        order = torch.randperm(width, generator=generator, device=device)
        return [self._columns_batch(order[i : i + static], static) for i in range(0, width, static)]

    def _group_batches(self, size: int | str, generator: Generator | None) -> list[Data]:
        if "group" not in self:
            raise ValueError("group batches need a 'group' column [N]; declare it per sequence")
        labels, inverse, counts = torch.unique(self["group"], return_inverse=True, return_counts=True)
        groups = labels.shape[0]
        if size == "full":
            per_batch, order = groups, list(range(groups))
        else:
            per_batch = min(int(size), groups)
            order = torch.randperm(groups, generator=generator, device=labels.device).tolist()
        members = torch.split(torch.argsort(inverse, stable=True), counts.tolist())
        chunks = [order[i : i + per_batch] for i in range(0, groups, per_batch)]
        # one static width for every batch: ragged groups would otherwise compile once per width
        width = max(sum(len(members[g]) for g in chunk) for chunk in chunks)
        batches = []
        for chunk in chunks:
            index = torch.cat([members[g] for g in chunk])
            label = torch.cat([torch.full_like(members[g], i) for i, g in enumerate(chunk)])
            batches.append(self._columns_batch(index, width, group=label, n_groups=len(chunk)))
        return batches

    def _columns_batch(
        self, index: Tensor, width: int, group: Tensor | None = None, n_groups: int | None = None
    ) -> Data:
        n, pad = index.shape[0], width - index.shape[0]
        if pad:
            index = torch.cat([index, index[:1].expand(pad)])
        columns = {k: self._take(k, v, index) for k, v in self._columns.items()}
        if group is not None:
            columns["group"] = torch.cat([group, group[-1:].expand(pad)])
        if pad:
            kept = torch.arange(width, device=index.device) < n
            columns["valid"] = tree_map(lambda x: x * kept, columns["valid"])
        return self._batch(columns, n_sequences=n, n_groups=n_groups)

    def _batch(self, columns: Mapping[str, Tree], n_sequences: int | None, n_groups: int | None = None,
               n_valid: Tensor | None = None) -> Data:  # fmt: skip
        """Attach the counts of the whole optimiser batch: micro-batches divide by them, so their sums are exact."""
        if n_valid is None:
            valid = columns["valid"]
            assert isinstance(valid, Tensor)
            n_valid = valid.sum()
        scalars: dict[str, Tree] = {"n_valid": n_valid}
        if n_sequences is not None:
            scalars["n_sequences"] = n_valid.new_tensor(float(n_sequences))
        if n_groups is not None:
            scalars["n_groups"] = n_valid.new_tensor(float(n_groups))
        return Data(
            dict(columns) | scalars,
            raw=self.raw | scalars.keys(),
            sequence=frozenset() if n_sequences is None else self.sequence,
            scalars=frozenset(scalars),
        )

    def microbatches(self, size: int | None) -> list[Data]:
        """Split a batch along its columns into pieces of at most ``size``; the counts stay those of the whole.

        A batch of groups is cut between groups, so a piece holds at least one whole group, whatever ``size``: a loss
        that compares inside groups would miss the pairs that a cut separates.
        """
        width = self.shape[1]
        if size is None or size >= width:
            return [self]
        widths: int | list[int] = self._whole_groups(size) if "n_groups" in self.scalars else size
        index = torch.arange(width, device=self["valid"].device)
        return [
            self._with({k: self._take(k, v, piece) for k, v in self._columns.items()}, successors=False)
            for piece in torch.split(index, widths)
        ]

    def _whole_groups(self, size: int) -> list[int]:
        """Widths of pieces of at most ``size`` columns, or of one group that is wider."""
        labels, counts = torch.unique_consecutive(self["group"], return_counts=True)
        if len(labels) != len(torch.unique(labels)):
            raise ValueError("microbatches: expected the columns of a group side by side, as group batches have them")
        pieces = [0]
        for count in counts.tolist():
            if pieces[-1] and pieces[-1] + count > size:
                pieces.append(0)
            pieces[-1] += count
        return pieces


def _unbind(tree: Tree) -> Sequence[Tree]:
    """Along the first axis."""
    if isinstance(tree, dict):
        return [dict(zip(tree, row)) for row in zip(*(leaf.unbind(0) for leaf in tree.values()))]
    return tree.unbind(0)


def tree_columns(columns: Mapping[str, Tree], fn: Callable[[Tensor], Tensor]) -> dict[str, Tree]:
    """Apply ``fn`` to every tensor of every column."""
    return {name: tree_map(fn, value) for name, value in columns.items()}
