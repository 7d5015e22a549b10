"""One environment's stream of episodes: the counters that cross rollout borders, and what a rollout adds to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccrl.batched_env import AutoresetMode, BatchedEnv, Tree
from ccrl.buffer import RolloutBuffer
from ccrl.data import Data
from ccrl.returns import forward_scan

__all__ = ["EpisodeStats", "Stream", "finish_rollout", "finish_step", "note"]


@dataclass
class EpisodeStats:
    """Episodes that ended in a rollout: undiscounted raw return and length, ``[E]`` on the host. The horizon ends fresh
    episodes."""

    returns: Tensor
    lengths: Tensor


class Stream:
    """One environment with its buffer and the facts that cross rollout borders."""

    def __init__(self, env: BatchedEnv) -> None:
        self.env = env
        self.obs: Tree | None = None
        n, device = env.num_envs, env.device
        self.step = torch.zeros(n, dtype=torch.int64, device=device)
        self.ended = torch.zeros(n, dtype=torch.bool, device=device)
        self.returns = torch.zeros(n, dtype=torch.float64, device=device)
        self.restarts = True
        """Some environment may have ended an episode, and its counters are still those of that episode."""
        self.state: Tensor | None = None
        """``[N, S]`` of a policy with a memory, before the next row."""
        self.first = torch.ones(n, dtype=torch.bool, device=device)
        """``[N]``: the next row begins an episode. Not ``ended``: with NEXT_STEP a dummy row lies between."""
        self.buffers: dict[tuple[Any, ...], RolloutBuffer] = {}

    def begin(self, obs: Tree | None) -> None:
        """Fresh episodes in every environment; None: as new, so that the next ``start`` begins them."""
        self.obs, self.state = obs, None
        for fact in (self.step, self.ended, self.returns):
            fact.zero_()

    def start(self, seed: int, resumed: bool) -> None:
        """Fresh episodes where none were begun, and where an evaluation has moved the only simulation of the process.

        :param resumed: the training has begun before: random ages would give it short episodes once more.
        """
        if self.obs is None:
            self.begin(self.env.reset(seed=seed))
            if hasattr(self.env, "randomise_ages") and not resumed:
                self.env.randomise_ages()
        elif getattr(self.env, "interrupted", False):
            self.begin(self.env.reset())

    def restart(self) -> None:
        """Counters of new episodes where one ended."""
        self.step.masked_fill_(self.ended, 0)
        self.returns.masked_fill_(self.ended, 0.0)
        self.ended.fill_(False)
        self.restarts = False


def note(new: dict[str, Any], log: dict[str, Any], counts: dict[str, Any]) -> None:
    """Add the scalars of a step to ``log``: means over the steps that had them, since somebody emptied it. A NaN tensor
    says that the step has none (no episode ended in it), without the host having to know.

    :param counts: kept between calls.
    """
    for key, value in new.items():
        if isinstance(value, Tensor):
            value = value if value.is_floating_point() else value.float()
            if key not in log:
                # a copy: environments may write every step's number into one tensor
                log[key], counts[key] = value.clone(), (~value.isnan()).to(value.dtype)
                continue
            old, count, known = log[key], counts[key], ~value.isnan()
            mean = torch.where(count > 0, old + (value - old) / (count + 1.0), value)
            log[key], counts[key] = torch.where(known, mean, old), count + known
        elif isinstance(value, int | float):
            count = counts[key] if key in log else 0
            log[key] = value if count == 0 else log[key] + (value - log[key]) / (count + 1)
            counts[key] = count + 1


def finish_rollout(stream: Stream, buffer: RolloutBuffer, hidden: bool) -> tuple[Data, EpisodeStats]:
    """Columns of the rollout and the episodes that ended in it; moves the stream's counters."""
    late = stream.env.autoreset_mode == AutoresetMode.NEXT_STEP
    data = buffer.data(step=stream.step, ended=stream.ended, next_step_reset=late, hidden_final=hidden)
    done = buffer.terminated | buffer.truncated
    going = torch.cat([(~stream.ended).unsqueeze(0), ~done[:-1]]).double()
    returns = forward_scan(buffer.reward.double(), going, stream.returns)
    lengths = torch.where(data["valid"] > 0, data["t"] + 1, 0)
    stream.returns.copy_(returns[-1])
    stream.step.copy_(lengths[-1])
    stream.ended.copy_(done[-1])
    stream.restarts = True
    return data, EpisodeStats(returns[done].cpu(), lengths[done].cpu())


def finish_step(stream: Stream, buffer: RolloutBuffer, hidden: bool) -> tuple[Data, EpisodeStats]:
    """``finish_rollout`` of one step without dummy rows: replay agents take millions of them, and the scans over time
    cost four times the step."""
    if stream.restarts:
        stream.restart()
    data, done = buffer.step_data(stream.step, hidden)
    stream.returns.add_(buffer.reward[0])
    stream.step.add_(1)
    if done is None:
        return data, EpisodeStats(_NONE, _NONE.long())
    stream.ended.copy_(done)
    stream.restarts = True
    ends = done.nonzero().squeeze(-1)
    return data, EpisodeStats(stream.returns.index_select(0, ends).cpu(), stream.step.index_select(0, ends).cpu())


_NONE = torch.zeros(0, dtype=torch.float64)
