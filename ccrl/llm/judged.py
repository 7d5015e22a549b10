"""Completions with judgements: pairs of which one is preferred, or verdicts. What reward models learn from.

    Judged.pairs(rows, vocab)             texts: {"prompt", "chosen", "rejected"}, as preference data sets have them
    Judged.verdicts(rows, vocab)          texts: {"prompt", "completion", "verdict"}
    Judged.pairs_of(rollout, score)       a policy's samples of one prompt, compared by a score
    Judged.verdicts_of(rollout, score)    a policy's samples and what somebody said of them

It is a ``Source`` of a ``DatasetLearner``: pairs (or completions) are drawn with replacement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from ccrl.data import Batching, Data
from ccrl.llm.task import pad_left, pad_right
from ccrl.llm.vocabulary import Vocabulary, encode_prompt, end_tokens

__all__ = ["Judged", "as_columns", "read_jsonl"]

KEPT = ("prompt", "prompt_valid", "action", "present", "valid")


@dataclass(frozen=True, eq=False)
class Judged:
    """Rows ``[T, N]`` with ``prompt``, ``prompt_valid`` ``[N, P]`` and ``preferred`` ``[N]`` (pairs: columns ``2i`` and
    ``2i + 1`` are one, +1 and -1) or ``verdict`` ``[N]``."""

    data: Data
    kind: Literal["pairs", "verdicts"]

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError(f"Judged: expected at least one of {self.kind}, got none")

    def __len__(self) -> int:
        """Pairs, or completions."""
        return self.data.shape[1] // (2 if self.kind == "pairs" else 1)

    def take(self, which: Tensor) -> Judged:
        """Some of the pairs, or of the completions, ``which`` int64."""
        if self.kind == "verdicts":
            return Judged(self.data.take(which), "verdicts")
        data = self.data.take(torch.stack([2 * which, 2 * which + 1], 1).flatten())
        group = torch.arange(len(which), device=which.device).repeat_interleave(2)
        return Judged(Data({**data, "group": group}, sequence=data.sequence | {"group"}), "pairs")

    def split(self, share: float, seed: int = 0) -> tuple[Judged, Judged]:
        """A random ``share`` of it, and the rest.

        :raises ValueError: unless both have something.
        """
        first = round(share * len(self))
        if not 0 < first < len(self):
            raise ValueError(
                f"split: expected a share of {len(self)} {self.kind} that leaves both parts some, got {share}"
            )
        order = torch.randperm(len(self), generator=Generator().manual_seed(seed)).to(self.data["valid"].device)
        return self.take(order[:first]), self.take(order[first:])

    def to(self, device: torch.device | str) -> Judged:
        """The same on ``device``."""
        columns = {name: self.data[name].to(device) for name in self.data}
        return Judged(Data(columns, sequence=self.data.sequence), self.kind)

    def whole(self, microbatch: int | None = None) -> Data:
        """All as one batch."""
        unit: Literal["group", "sequence"] = "group" if self.kind == "pairs" else "sequence"
        return self.data.epoch(Batching(unit, "full", microbatch=microbatch), None)[0]

    def sample(self, spec: Batching, generator: Generator | None) -> Data:
        """A batch of ``spec.size`` pairs, or completions, with the counts that losses divide by."""
        size = len(self) if spec.size == "full" else spec.size
        device = self.data["valid"].device
        return self.take(torch.randint(len(self), (size,), generator=generator, device=device)).whole(spec.microbatch)

    # -- from texts ---------------------------------------------------------------------------------------------------

    @classmethod
    def pairs(cls, rows: Iterable[Mapping[str, Any]], vocab: Vocabulary, max_tokens: int | None = None) -> Judged:
        """Pairs of texts: ``prompt``, ``chosen``, ``rejected``. Equal completions are no pair and are left out,
        those among them that only the cut makes equal.

        :param max_tokens: completions are cut after so many tokens; None: never.
        :raises ValueError: a field is missing or no text, or no pair is left.
        """
        prompts, completions = list[str](), list[str]()
        for i, row in enumerate(rows):
            prompt, chosen, rejected = (_text(row, name, i) for name in ("prompt", "chosen", "rejected"))
            if chosen != rejected:
                prompts += [prompt, prompt]
                completions += [chosen, rejected]
        columns = as_columns(prompts, completions, vocab, max_tokens)
        # what differs after the cut; padding is no token of a completion
        written = columns["action"].masked_fill(columns["present"] == 0, -1).t()
        differ = (written[0::2] != written[1::2]).any(1)
        return _paired(columns, differ.repeat_interleave(2).nonzero().squeeze(-1))

    @classmethod
    def verdicts(cls, rows: Iterable[Mapping[str, Any]], vocab: Vocabulary, max_tokens: int | None = None) -> Judged:
        """Texts with a number each: ``prompt``, ``completion``, ``verdict``.

        :raises ValueError: a field is missing or not of its type, or there is no row.
        """
        found = list(rows)
        prompts = [_text(row, "prompt", i) for i, row in enumerate(found)]
        completions = [_text(row, "completion", i) for i, row in enumerate(found)]
        said = torch.tensor([_number(row, "verdict", i) for i, row in enumerate(found)])
        columns = as_columns(prompts, completions, vocab, max_tokens)
        return cls(columns.derive_sequence(verdict=said), "verdicts")

    # -- from rollouts ------------------------------------------------------------------------------------------------

    @classmethod
    def pairs_of(cls, data: Data, score: Tensor, generator: Generator, noise: float = 0.0) -> Judged:
        """Pairs of a rollout's completions of one prompt: each group is shuffled and neighbours are compared.

        :param score: ``[N]``; ties are no pairs unless there is noise.
        :param noise: 0: the higher score is preferred. Else the preferred one is drawn with probability
            ``sigmoid(difference / noise)`` (Bradley-Terry).
        :raises ValueError: no two completions of one prompt differ.
        """
        group = data["group"]
        order = torch.randperm(len(group), generator=generator, device=group.device)
        order = order[group[order].argsort(stable=True)]
        _, counts = torch.unique(group, return_counts=True)
        place = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        first = ((place % 2 == 0) & (place + 1 < counts.repeat_interleave(counts))).nonzero().squeeze(-1)
        one, other = order[first], order[first + 1]
        gap = (score[one] - score[other]).double()
        if noise > 0.0:
            drawn = torch.rand(len(gap), generator=generator, device=gap.device, dtype=torch.float64)
            better = drawn < (gap / noise).sigmoid()
        else:
            keep = gap != 0.0
            one, other, better = one[keep], other[keep], gap[keep] > 0.0
        best, worst = torch.where(better, one, other), torch.where(better, other, one)
        return _paired(_kept(data), torch.stack([best, worst], 1).flatten())

    @classmethod
    def verdicts_of(cls, data: Data, score: Tensor) -> Judged:
        """A rollout's completions with ``score`` ``[N]`` as the verdicts."""
        return cls(_kept(data).derive_sequence(verdict=score), "verdicts")


def as_columns(prompts: list[str], completions: list[str], vocab: Vocabulary, max_tokens: int | None = None) -> Data:
    """Texts as rows of a rollout: prompts padded on the left, completions with their end token and padded on the right.

    :raises ValueError: there are none.
    """
    if not prompts:
        raise ValueError("expected at least one prompt with completions, got none")
    end = end_tokens(vocab)[:1]
    shown = [[*vocab.encode(text), *end][:max_tokens] for text in completions]
    tokens, prompt_valid = pad_left([encode_prompt(vocab, text) for text in prompts], vocab.pad)
    width = max(1, max(map(len, shown)))
    present = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in shown]).t()
    columns = {"prompt": tokens, "prompt_valid": prompt_valid, "action": pad_right(shown, vocab.pad, width).t(),
               "present": present, "valid": present}  # fmt: skip
    return Data(columns, raw=frozenset(), sequence=frozenset({"prompt", "prompt_valid"}))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """One JSON object per line.

    :raises ValueError: a line that is none, with file and line.
    """
    rows: list[dict[str, Any]] = []
    # of bytes: a text's lines also end at characters that a JSON string may hold
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            said = line[:60].decode(errors="replace")
            raise ValueError(f"{path}:{number}: expected a JSON object, got {said!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def _kept(data: Data) -> Data:
    """A copy of what a reward model reads: rollouts are views of a buffer that the next one overwrites."""
    sequence = frozenset({"prompt", "prompt_valid"})
    return Data({name: data[name].clone() for name in KEPT}, raw=frozenset(), sequence=sequence)


def _paired(data: Data, columns: Tensor) -> Judged:
    data = data.take(columns)
    sign = torch.tensor([1.0, -1.0], device=columns.device).repeat(len(columns) // 2)
    group = torch.arange(len(columns) // 2, device=columns.device).repeat_interleave(2)
    return Judged(data.derive_sequence(preferred=sign, group=group), "pairs")


def _text(row: Mapping[str, Any], name: str, i: int) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"row {i}: {name}: expected a text, got {row.get(name)!r}")
    return str(row[name])


def _number(row: Mapping[str, Any], name: str, i: int) -> float:
    value = row.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"row {i}: {name}: expected a finite number, got {value!r}")
    return float(value)
