"""Completions into the shared rollout buffer: a token is a step, a completion a column, a prompt a group.

Four verbs: ``draw`` prompts, ``plan`` how many completions of which, ``generate`` them, ``score`` them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ccrl.buffer import RolloutBuffer
from ccrl.collect import EpisodeStats, Request
from ccrl.data import Data, Field
from ccrl.llm.decoding import FIELDS, decode
from ccrl.llm.policy import TokenPolicy
from ccrl.llm.task import AdaptiveTask, FiniteTask, Prompts, Split, TextTask
from ccrl.seeding import named_generator, restore_generator

__all__ = ["Completions", "TokenCollector"]


@dataclass(frozen=True)
class Completions:
    """What was written and not yet verified."""

    buffer: RolloutBuffer
    """Tokens, flags and log-probabilities; used again at the next request of its tag."""
    prompts: Prompts
    question: Tensor
    """``[N]`` int64: which of the prompts each column answers."""
    valid: Tensor
    """``[T, N]`` float32: tokens that the policy chose, or that a demonstration shows."""
    present: Tensor
    """``[T, N]`` float32: tokens in the context; replies are present and not valid."""
    demonstration: bool = False

    @property
    def length(self) -> Tensor:
        """``[N]`` int64: tokens present."""
        return self.present.sum(0).long()


class TokenCollector:
    """Serves requests for completions, as ``Collector`` does for environment steps.

    A rollout is ``[T, N]``, ``T`` its longest completion rounded up to ``pad_to_multiple_of``. Per step: ``action``
    (the token), ``log_prob`` (behaviour), ``present`` (in the context), ``valid`` (chosen by the policy: replies are
    present and not valid), ``reward`` (all of it on the last token), flags and masks. Per sequence: ``prompt``,
    ``prompt_valid`` ``[N, P]``, ``group`` (number of the prompt in the rollout), ``index`` (which question it is),
    ``episode_reward`` (reward), ``reward_components`` ``[N, C]`` (its components), ``answer``, ``length`` (tokens
    present), ``capped`` (stopped by the cap), ``demonstration`` (1: not sampled; its ``log_prob`` is 0).

    :param fields: more raw columns that an estimator declares; of the sampling distribution ``entropy`` (nats) and
        ``sum_pi2``.
    :param pad_to_multiple_of: completions are padded to a multiple of it, so that compiled and cached shapes are few.
    :param top_p, top_k: what tokens are sampled from, see ``ccrl.llm.decoding.truncate``; scores are not truncated.
    :param max_new_tokens: a shorter cap of completions than the task's; None: the task's.
    :raises ValueError: a cap that would do nothing, above the task's or of completions of a fixed length.
    """

    def __init__(
        self, task: TextTask, *, seed: int = 0, device: torch.device | str = "cpu", fields: tuple[Field, ...] = (),
        pad_to_multiple_of: int = 1, max_new_tokens: int | None = None, top_p: float = 1.0, top_k: int = 0,
    ) -> None:  # fmt: skip
        unknown = {f.name for f in fields} - FIELDS.keys()
        if unknown:
            raise ValueError(f"fields: expected names among {sorted(FIELDS)}, got {sorted(unknown)}")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of: expected >= 1, got {pad_to_multiple_of}")
        self.task, self.device, self.pad_to_multiple_of = task, torch.device(device), pad_to_multiple_of
        if not 0.0 < top_p <= 1.0 or top_k < 0:
            raise ValueError(f"top_p, top_k: expected a number in (0, 1] and one >= 0, got {top_p} and {top_k}")
        self.top_p, self.top_k = top_p, top_k
        fixed = getattr(task, "fixed_length", None)
        if max_new_tokens is not None:
            _check_cap(task, max_new_tokens, fixed)
        self.steps = int(fixed or max_new_tokens or task.max_new_tokens)
        self._fixed = fixed is not None
        self._fields = fields
        self.generator = named_generator(seed, "completions", self.device)
        self.prompt_generator = named_generator(seed, "prompts")
        self.total_steps, self.fresh_steps = 0, 0
        """Completions sampled so far (demonstrations do not count): the agent's clock."""
        self.tokens = 0
        """Tokens sampled so far."""
        self.stats = EpisodeStats(torch.zeros(0), torch.zeros(0))
        self.log: dict[str, Any] = {}
        self.env_seconds = 0.0
        """Wall time of making prompts and verifying answers; the owner resets it."""
        self.prompts: dict[str, Prompts] = {}
        """The prompts of each tag's last rollout."""
        self._drawn: Prompts | None = None
        """Drawn, and not yet taken by a request."""
        self._left = torch.zeros(0, dtype=torch.int64)
        """Of a task with a list of questions: those that this epoch has yet to ask, in their order."""
        self._buffers: dict[str, RolloutBuffer] = {}

    @property
    def clock(self) -> int:
        """Completions sampled so far (demonstrations do not count)."""
        return self.total_steps

    # -- the four verbs -----------------------------------------------------------------------------------------------

    def draw(self, n: int) -> Prompts:
        """The next ``n`` training prompts. The first request takes them; where it names prompts of its own, those stand
        in their place and nobody gets these.

        A task with a list of questions (``FiniteTask``) is asked in epochs: every question once before any comes again.

        :raises ValueError: for fewer than one prompt.
        """
        if n < 1:
            raise ValueError(f"draw: expected at least one prompt, got {n}")
        start = time.perf_counter()
        if isinstance(self.task, FiniteTask):
            prompts = self.task.ask(self._next(n, self.task.count("train")), "train")
        else:
            prompts = self.task.prompts(n, self.prompt_generator)
        self._drawn = prompts.to(self.device)
        self.env_seconds += time.perf_counter() - start
        return self._drawn

    def plan(self, request: Request) -> tuple[Prompts, Tensor]:
        """What is to be written: prompts, and for each column ``[N]`` which of them it answers.

        :raises ValueError: for a request without ``counts``, with another number of them than of prompts or none at
            all, or with an unknown source.
        """
        if request.counts is None:
            raise ValueError(f"TokenCollector: expected a request with counts (completions per prompt), got {request}")
        counts = request.counts.to(self.device)
        if request.source is not None:
            if request.source not in self.prompts:
                raise ValueError(f"request {request.tag!r}: expected a source among {sorted(self.prompts)}, got "
                                 f"{request.source!r}")  # fmt: skip
            prompts = self.prompts[request.source]
        elif request.prompts is not None:
            prompts = request.prompts.to(self.device)
        else:
            prompts = self.draw(int(counts.shape[0])) if self._drawn is None else self._drawn
        if counts.shape != (len(prompts),):
            raise ValueError(f"request {request.tag!r}: expected counts [{len(prompts)}], one per prompt, got "
                             f"{tuple(counts.shape)}; name the prompts that are meant")  # fmt: skip
        question = torch.repeat_interleave(torch.arange(len(prompts), device=self.device), counts)
        if not question.numel():
            raise ValueError(f"request {request.tag!r}: expected at least one completion, got counts of 0 alone")
        if request.source is None:
            self._drawn = None
        self.prompts[request.tag] = prompts
        return prompts, question

    def generate(
        self, policy: TokenPolicy, prompts: Prompts, question: Tensor, *, tag: str = "on", deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Completions:  # fmt: skip
        """One completion per entry of ``question`` ``[N]``, not verified. ``deterministic``: the most probable
        tokens."""
        n = question.shape[0]
        prompts, buffer = prompts.to(self.device), self._cleared(tag, n)
        source = self.generator if generator is None else generator
        noise = torch.rand(self.steps, n, generator=source, device=self.device)
        valid, present = decode(
            policy, self.task, prompts, question, buffer, noise, fixed=self._fixed, deterministic=deterministic,
            top_p=self.top_p, top_k=self.top_k,
        )  # fmt: skip
        return Completions(buffer, prompts, question, valid, present)

    def score(self, written: Completions) -> Data:
        """Verify completions: the rollout. Its columns are views of the buffer, valid until the next request of this
        tag.

        :raises FloatingPointError: if a score is not finite.
        """
        buffer, prompts, question = written.buffer, written.prompts, written.question
        n, length = question.shape[0], written.length
        start = time.perf_counter()
        score = self.task.score(prompts, question, buffer.action, length)
        self.env_seconds += time.perf_counter() - start
        components, answer = score.components.to(self.device), score.answer.to(self.device)
        if not bool(components.isfinite().all()):
            bad = int((~components.isfinite()).any(1).nonzero()[0])
            raise FloatingPointError(f"task {self.task.name!r}: the score of completion {bad} is not finite "
                                     f"({components[bad].tolist()})")  # fmt: skip
        total = components.sum(1)
        columns = torch.arange(n, device=self.device)
        buffer.reward[(length - 1).clamp_min(0), columns] = torch.where(length > 0, total, 0.0)
        zeros = torch.zeros(n, dtype=torch.int64, device=self.device)
        data = buffer.data(step=zeros, ended=zeros.bool())
        longest = -(-max(1, int(length.max())) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        valid, present = written.valid[:longest], written.present[:longest]
        # what lies after the end of a column belongs to no episode
        steps = {k: data[k][:longest] for k in data if k not in data.sequence and k != "obs"}
        steps |= {"valid": valid, "present": present, "carry": steps["carry"] * present}
        sequence = {
            "prompt": prompts.tokens[question], "prompt_valid": prompts.valid[question], "group": question,
            "index": prompts.index[question], "episode_reward": total, "reward_components": components,
            "answer": answer, "length": length, "capped": buffer.truncated.any(0),
            "demonstration": torch.full_like(total, float(written.demonstration)),
        }  # fmt: skip
        return Data(steps | sequence, sequence=frozenset(sequence))

    # -- what they compose --------------------------------------------------------------------------------------------

    def collect(self, request: Request, policy: TokenPolicy) -> Data:
        """Plan, generate and score as asked; prompts are drawn if there are none."""
        prompts, question = self.plan(request)
        if request.demonstrations:
            return self.score(self.demonstrate(prompts, question, request.tag))
        data = self.score(self.generate(policy, prompts, question, tag=request.tag))
        self.total_steps += question.shape[0]
        self.tokens += int(data["valid"].sum())
        self.stats = EpisodeStats(data["episode_reward"].double().cpu(), data["length"].cpu())
        if isinstance(self.task, AdaptiveTask):
            self.log |= self.task.learned(data["index"], data["reward_components"][:, 0])
        return data

    def sample(
        self, policy: TokenPolicy, prompts: Prompts, question: Tensor, *, tag: str = "on", deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Data:  # fmt: skip
        """``generate``, then ``score``: one verified completion per entry of ``question``."""
        return self.score(
            self.generate(policy, prompts, question, tag=tag, deterministic=deterministic, generator=generator)
        )

    def complete(self, policy: TokenPolicy, prompts: Prompts, deterministic: bool = False) -> list[list[int]]:
        """One completion per prompt, not verified."""
        question = torch.arange(len(prompts), device=self.device)
        written = self.generate(policy, prompts, question, tag="complete", deterministic=deterministic)
        return [row[:n] for row, n in zip(written.buffer.action.t().tolist(), written.length.tolist())]

    def demonstrate(self, prompts: Prompts, question: Tensor, tag: str = "demonstrations") -> Completions:
        """The questions' demonstrations as columns; a question without one gives a column without valid rows, one
        longer than the cap is cut there.

        :raises ValueError: the task has none.
        """
        shown, mask = prompts.demonstration, prompts.demonstration_valid
        if shown is None or mask is None:
            raise ValueError(f"task {self.task.name!r} has no demonstrations; methods that imitate need some")
        buffer = self._cleared(tag, question.shape[0])
        width = min(self.steps, shown.shape[1])
        present = torch.zeros(self.steps, question.shape[0], device=self.device)
        present[:width] = mask[question, :width].t()
        valid = present.clone()
        if prompts.demonstration_forced is not None:
            valid[:width] *= 1.0 - prompts.demonstration_forced[question, :width].t()
        # padding may be no token at all, and would be an index
        tokens = torch.where(present[:width] > 0, shown[question, :width].t(), buffer.action[:width])
        buffer.action[:width] = tokens
        length = present.sum(0).long()
        whole = mask[question].sum(1).long() <= length
        for flag, which in ((buffer.terminated, whole), (buffer.truncated, ~whole)):
            some = (which & (length > 0)).nonzero().squeeze(-1)
            flag[length[some] - 1, some] = True
        return Completions(buffer, prompts, question, valid, present, demonstration=True)

    def test_prompts(self, n: int, seed: int, split: Split = "test") -> Prompts:
        """Questions that training does not move: decided by ``seed`` alone.

        :raises ValueError: for fewer than one.
        """
        if n < 1:
            raise ValueError(f"questions: expected at least one, got {n}")
        return self.task.prompts(n, named_generator(seed, "test prompts"), split).to(self.device)

    # -- state --------------------------------------------------------------------------------------------------------

    def _next(self, n: int, count: int) -> Tensor:
        """Numbers of the next ``n`` of ``count`` questions."""
        found = [self._left[:n]]
        self._left = self._left[n:]
        while (missing := n - sum(map(len, found))) > 0:
            epoch = torch.randperm(count, generator=self.prompt_generator)
            found.append(epoch[:missing])
            self._left = epoch[missing:]
        return torch.cat(found)

    def _cleared(self, tag: str, n: int) -> RolloutBuffer:
        """The buffer of a tag, without what was in it."""
        buffer = self._buffers.get(tag)
        if buffer is None or buffer.num_envs != n:
            tokens: gym.Space[Any] = gym.spaces.Discrete(self.task.vocab.size)
            fields = (Field("log_prob"), *self._fields)
            buffer = self._buffers[tag] = RolloutBuffer(
                self.steps, n, tokens, tokens, fields=fields, device=self.device, keep_final_obs=False
            )
        buffer.clear(0)
        buffer.action.fill_(0 if self._fixed else max(self.task.vocab.pad, 0))
        for column in buffer.extra.values():
            column.zero_()
        return buffer

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(), "prompt_generator": self.prompt_generator.get_state(),
            "total_steps": self.total_steps, "tokens": self.tokens, "left": self._left,
            "task": self.task.state_dict() if isinstance(self.task, AdaptiveTask) else {},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore_generator(self.generator, state["generator"])
        restore_generator(self.prompt_generator, state["prompt_generator"])
        self.total_steps, self.tokens, self._left = state["total_steps"], state["tokens"], state["left"].cpu().clone()
        self._drawn = None
        if isinstance(self.task, AdaptiveTask):
            self.task.load_state_dict(state["task"])


def _check_cap(task: TextTask, cap: int, fixed: int | None) -> None:
    if fixed is not None and cap != fixed:
        raise ValueError(f"max_new_tokens: all completions of task {task.name!r} have {fixed} tokens, got a cap of "
                         f"{cap}; leave it out")  # fmt: skip
    if not 0 < cap <= task.max_new_tokens:
        raise ValueError(f"max_new_tokens: expected 1 to {task.max_new_tokens}, the longest completion of task "
                         f"{task.name!r}, got {cap}; give the task itself a longer one")  # fmt: skip
