"""Generated samples into the shared rollout buffer: a denoising step is a step, a sample a column, a condition a group.

Four verbs, as for language models: ``draw`` conditions, ``plan`` how many samples of which, ``generate``, ``score``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ccrl.buffer import RolloutBuffer
from ccrl.collect import EpisodeStats, Request
from ccrl.data import Data, Field
from ccrl.diffusion.flow import Schedule, gaussian_log_prob
from ccrl.flow.task import Conditions, FlowTask
from ccrl.policies.flow import FlowPolicy
from ccrl.seeding import named_generator, restore_generator

__all__ = ["FlowCollector", "Generated", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How samples are made."""

    schedule: Schedule
    first: int = 0
    """The first transition that is trained on; those before it are walked and not stored in ``Data``."""
    last: int | None = None
    """The one behind the last that is trained on; None: all up to the end."""

    def __post_init__(self) -> None:
        end = len(self.schedule) if self.last is None else self.last
        if not 0 <= self.first < end <= len(self.schedule):
            raise ValueError(f"Sampling: expected 0 <= first < last <= {len(self.schedule)}, got {self.first}, {end}")

    @property
    def rows(self) -> slice:
        """The transitions that are trained on."""
        return slice(self.first, len(self.schedule) if self.last is None else self.last)


@dataclass(frozen=True)
class Generated:
    """Samples that are not scored yet."""

    buffer: RolloutBuffer
    """States, means and log-probabilities of all transitions; used again at the next request of its tag."""
    conditions: Conditions
    question: Tensor
    """``[N]`` int64: which of the conditions each column is a sample of."""
    clean: Tensor
    """``[N, D]``: the samples."""


class FlowCollector:
    """Serves requests for samples (``Request.counts``), as ``TokenCollector`` does for completions.

    A rollout is ``[T, N]``, ``T`` the trained transitions. Per step: ``obs`` (x_t) and ``action`` (the next state)
    ``[T, N, D]``, ``old_mean`` ``[T, N, D]``, ``log_prob``, ``std``, ``sigma``, ``dt``, ``time``, the factors
    ``mean_x`` and ``mean_v``, with dpm2 ``mean_past`` ``[T, N, D]``.
    Per sequence: ``clean`` ``[N, D]``, ``condition`` ``[N, C]`` (one-hot), ``label``,
    ``group``, ``episode_reward``, ``reward_components``. Methods that are decoupled from the sampler read ``clean``
    alone.
    """

    def __init__(
        self, task: FlowTask, sampling: Sampling, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.task, self.sampling, self.device = task, sampling, torch.device(device)
        self.generator = named_generator(seed, "samples", self.device)
        self.condition_generator = named_generator(seed, "conditions")
        self.total_steps = 0
        """Samples so far: the agent's clock."""
        self.stats = EpisodeStats(torch.zeros(0), torch.zeros(0))
        self.log: dict[str, Any] = {}
        self.env_seconds = 0.0
        """Wall time of rewards; the owner resets it."""
        self._drawn: Conditions | None = None
        self._buffers: dict[tuple[str, int], RolloutBuffer] = {}
        self._deal = torch.zeros(0, dtype=torch.int64)
        self._schedule: tuple[Schedule, Schedule] | None = None
        self._made: tuple[RolloutBuffer, Sampling, dict[str, Tensor]] | None = None

    @property
    def clock(self) -> int:
        """Samples so far."""
        return self.total_steps

    @property
    def steps(self) -> int:
        """Rows of a rollout."""
        rows = self.sampling.rows
        return int(rows.stop - rows.start)

    # -- the four verbs -----------------------------------------------------------------------------------------------

    def draw(self, n: int) -> Conditions:
        """The next ``n`` conditions: every one of the task's once, in a random order, before any comes again.

        :raises ValueError: for fewer than one.
        """
        if n < 1:
            raise ValueError(f"draw: expected at least one condition, got {n}")
        while len(self._deal) < n:
            more = torch.randperm(self.task.conditions, generator=self.condition_generator)
            self._deal = torch.cat([self._deal, more])
        taken, self._deal = self._deal[:n], self._deal[n:]
        self._drawn = Conditions(taken).to(self.device)
        return self._drawn

    def plan(self, request: Request) -> tuple[Conditions, Tensor]:
        """Conditions, and for each column ``[N]`` which of them it is a sample of.

        :raises ValueError: for a request without ``counts``, or with another number of them than of conditions.
        """
        if request.counts is None or request.demonstrations or request.source is not None:
            raise ValueError(f"FlowCollector: expected a request with counts (samples per condition), got {request}")
        counts = request.counts.to(self.device)
        if request.prompts is not None:
            conditions = request.prompts.to(self.device)
        else:
            conditions = self.draw(int(counts.shape[0])) if self._drawn is None else self._drawn
            self._drawn = None
        if counts.shape != (len(conditions),):
            raise ValueError(f"request {request.tag!r}: expected counts [{len(conditions)}], one per condition, got "
                             f"{tuple(counts.shape)}")  # fmt: skip
        question = torch.repeat_interleave(torch.arange(len(conditions), device=self.device), counts)
        if not question.numel():
            raise ValueError(f"request {request.tag!r}: expected at least one sample, got counts of 0 alone")
        return conditions, question

    @torch.no_grad()
    def generate(
        self, policy: FlowPolicy, conditions: Conditions, question: Tensor, *, tag: str = "on",
        generator: torch.Generator | None = None, sampling: Sampling | None = None,
    ) -> Generated:  # fmt: skip
        """One sample per entry of ``question`` ``[N]``."""
        how = self.sampling if sampling is None else sampling
        source = self.generator if generator is None else generator
        n, steps, size = question.shape[0], len(how.schedule), self.task.size
        dtype = next(policy.parameters()).dtype
        start = torch.randn(n, size, generator=source, device=self.device, dtype=dtype)
        noise = None
        if bool((how.schedule.std > 0.0).any()):
            noise = torch.randn(steps, n, size, generator=source, device=self.device, dtype=dtype)
        condition = self.features(conditions.label[question]).to(dtype)
        schedule = self._columns(how.schedule, dtype)
        buffer = self._buffer(tag, n, steps, schedule.past is not None)
        states, means = policy.rollout(start, condition, schedule, noise, buffer.extra.get("mean_past"))
        buffer.clear(0)
        buffer.obs.copy_(states)  # type: ignore[union-attr]
        buffer.action.copy_(states[1:])
        buffer.extra["old_mean"].copy_(means)
        if noise is None:
            buffer.extra["log_prob"].zero_()
        else:
            std = schedule.std.view(-1, 1).expand(steps, n)
            buffer.extra["log_prob"].copy_(gaussian_log_prob(states[1:], means, std, policy.reduce))
        return Generated(buffer, conditions, question, states[-1])

    def score(self, made: Generated, sampling: Sampling | None = None) -> Data:
        """The rollout with its rewards. Columns are views of the buffer, valid until the next request of this tag.

        :raises FloatingPointError: if a sample or a reward is not finite.
        """
        how = self.sampling if sampling is None else sampling
        buffer, n, rows = made.buffer, made.question.shape[0], how.rows
        label = made.conditions.label[made.question]
        if not bool(made.clean.isfinite().all()):
            raise FloatingPointError(f"task {self.task.name!r}: a sample is not finite; the policy has diverged")
        begun = time.perf_counter()
        components = self.task.score(made.clean, label).to(buffer.reward.dtype)
        self.env_seconds += time.perf_counter() - begun
        if not bool(components.isfinite().all()):
            bad = int((~components.isfinite()).any(1).nonzero()[0])
            raise FloatingPointError(f"task {self.task.name!r}: the reward of sample {bad} is not finite "
                                     f"({components[bad].tolist()})")  # fmt: skip
        total = components.sum(1)
        buffer.reward[-1] = total
        buffer.terminated[-1] = True
        steps = self._steps(buffer, how)
        length = torch.full((n,), rows.stop - rows.start, dtype=torch.int64, device=self.device)
        sequence = {
            "clean": made.clean, "condition": self.features(label), "label": label, "group": made.question,
            "index": label, "episode_reward": total, "reward_components": components, "length": length,
        }  # fmt: skip
        return Data(steps | sequence, sequence=frozenset(sequence))

    # -- what they compose --------------------------------------------------------------------------------------------

    def collect(self, request: Request, policy: Any) -> Data:
        """Plan, generate and score as asked; conditions are drawn if there are none."""
        conditions, question = self.plan(request)
        data = self.score(self.generate(policy, conditions, question, tag=request.tag))
        self.total_steps += question.shape[0]
        self.stats = EpisodeStats(data["episode_reward"].double().cpu(), data["length"].cpu())
        return data

    def samples(self, policy: FlowPolicy, label: Tensor, seed: int, sampling: Sampling | None = None) -> Tensor:
        """One sample ``[N, D]`` per label ``[N]``, decided by ``seed``; training does not move it."""
        generator = named_generator(seed, "evaluation", self.device)
        conditions, question = Conditions(label.to(self.device)), torch.arange(len(label), device=self.device)
        return self.generate(policy, conditions, question, tag="samples", generator=generator, sampling=sampling).clean

    def features(self, label: Tensor) -> Tensor:
        """What the network sees of labels ``[N]``: one-hot ``[N, C]`` float32, zeros for no condition (-1)."""
        return F.one_hot(label + 1, self.task.conditions + 1)[:, 1:].float()

    def _steps(self, buffer: RolloutBuffer, how: Sampling) -> dict[str, Tensor]:
        """Columns per step: views of the buffer, and those that every rollout of this buffer has in common (masks,
        counters, the schedule), which are made once."""
        if self._made is None or self._made[0] is not buffer or self._made[1] is not how:
            n, rows = buffer.num_envs, how.rows
            zeros = torch.zeros(n, dtype=torch.int64, device=self.device)
            data = buffer.data(step=zeros, ended=zeros.bool())
            found: dict[str, Tensor] = {k: data[k][rows] for k in data if k not in data.sequence}  # type: ignore[index]
            schedule = self._columns(how.schedule, buffer.reward.dtype)
            columns = {"time": schedule.time, "dt": schedule.dt, "std": schedule.std, "sigma": schedule.sigma,
                       "mean_x": schedule.x, "mean_v": schedule.v}  # fmt: skip
            found |= {k: v[rows].view(-1, 1).expand(-1, n) for k, v in columns.items()}
            self._made = buffer, how, found | {"present": found["valid"]}
        return self._made[2]

    def _columns(self, schedule: Schedule, dtype: torch.dtype) -> Schedule:
        """The schedule on this device; the last one is kept, as training uses the same at every iteration."""
        if self._schedule is None or self._schedule[0] is not schedule or self._schedule[1].time.dtype != dtype:
            self._schedule = schedule, schedule.to(self.device, dtype)
        return self._schedule[1]

    # -- state --------------------------------------------------------------------------------------------------------

    def _buffer(self, tag: str, n: int, steps: int, past: bool) -> RolloutBuffer:
        found = self._buffers.get((tag, n))
        if found is None or found.steps != steps or ("mean_past" in found.extra) != past:
            size = self.task.size
            space = gym.spaces.Box(-np.inf, np.inf, (size,))
            fields = [Field("log_prob"), Field("old_mean", (size,)), *([Field("mean_past", (size,))] if past else [])]
            self._buffers[tag, n] = RolloutBuffer(
                steps, n, space, space, fields=tuple(fields), device=self.device, keep_final_obs=False
            )
        return self._buffers[tag, n]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "condition_generator": self.condition_generator.get_state(),
                "total_steps": self.total_steps, "deal": self._deal}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore_generator(self.generator, state["generator"])
        restore_generator(self.condition_generator, state["condition_generator"])
        self.total_steps, self._deal = state["total_steps"], state["deal"].cpu().clone()
        self._drawn = None
