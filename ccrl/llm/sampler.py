"""Completions into the shared rollout buffer: a token is a step, a completion a column, a prompt a group."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ccrl.buffer import RolloutBuffer
from ccrl.collect import EpisodeStats, Request
from ccrl.data import Data, Field
from ccrl.llm.policy import TokenPolicy, entropy_of
from ccrl.llm.task import ConversationTask, Prompts, Split, TextTask

__all__ = ["TokenCollector"]

COMPACT = 0.75
"""Finished completions leave the computation when at most this share of the rows still runs."""
LOOK = 8
"""On an accelerator the host asks every so many tokens which rows still run: each question waits for the device."""


class TokenCollector:
    """Serves requests for completions, as ``Collector`` does for environment steps.

    A rollout is ``[T, N]``, ``T`` its longest completion rounded up to ``pad_to_multiple_of``. Per step: ``action``
    (the token),
    ``log_prob`` (behaviour), ``present`` (in the context), ``valid`` (chosen by the policy: replies are present and not
    valid), ``reward`` (all of it on the last token), flags and masks. Per sequence: ``prompt``, ``prompt_valid``
    ``[N, P]``, ``group`` (number of the prompt in the rollout), ``index`` (which question it is), ``episode_reward``
    (reward),
    ``reward_components`` ``[N, C]`` (its components), ``answer``, ``length`` (tokens present), ``capped`` (stopped
    by the cap),
    ``demonstration`` (1: not sampled; its ``log_prob`` is 0).

    :param fields: more raw columns that an estimator declares; ``entropy`` (nats, of the sampling distribution) is the
        one there is.
    :param pad_to_multiple_of: completions are padded to a multiple of it, so that compiled and cached shapes are few.
    """

    def __init__(
        self, task: TextTask, *, seed: int = 0, device: torch.device | str = "cpu", fields: tuple[Field, ...] = (),
        pad_to_multiple_of: int = 1, max_new_tokens: int | None = None,
    ) -> None:  # fmt: skip
        unknown = {f.name for f in fields} - {"entropy"}
        if unknown:
            raise ValueError(f"fields: expected names among ['entropy'], got {sorted(unknown)}")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of: expected >= 1, got {pad_to_multiple_of}")
        self.task, self.device, self.pad_to_multiple_of = task, torch.device(device), pad_to_multiple_of
        fixed = getattr(task, "fixed_length", None)
        self.steps = int(fixed or min(task.max_new_tokens, max_new_tokens or task.max_new_tokens))
        self._fixed = fixed is not None
        self._entropy = bool(fields)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.prompt_generator = torch.Generator().manual_seed(seed + 1_000_003)
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
        self._buffers: dict[tuple[str, int], RolloutBuffer] = {}

    # -- requests -----------------------------------------------------------------------------------------------------

    def collect(self, request: Request, policy: TokenPolicy) -> Data:
        """Sample as asked; the returned columns are views of the buffer, valid until the next request of this tag."""
        if request.counts is None:
            raise ValueError(f"TokenCollector: expected a request with counts (completions per prompt), got {request}")
        counts = request.counts.to(self.device)
        if request.source is None:
            start = time.perf_counter()
            prompts = self._to_device(self.task.prompts(int(counts.shape[0]), self.prompt_generator))
            self.env_seconds += time.perf_counter() - start
        else:
            prompts = self.prompts[request.source]
        if counts.shape != (len(prompts),):
            raise ValueError(f"request {request.tag!r}: expected counts [{len(prompts)}], got {tuple(counts.shape)}")
        self.prompts[request.tag] = prompts
        question = torch.repeat_interleave(torch.arange(len(prompts), device=self.device), counts)
        if request.demonstrations:
            return self._demonstrate(prompts, question, request.tag)
        data = self.sample(policy, prompts, question, tag=request.tag)
        self.total_steps += question.shape[0]
        self.tokens += int(data["valid"].sum())
        self.stats = EpisodeStats(data["episode_reward"].double().cpu(), data["length"].cpu())
        return data

    def sample(
        self, policy: TokenPolicy, prompts: Prompts, question: Tensor, *, tag: str = "on", deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Data:  # fmt: skip
        """One completion per entry of ``question`` ``[N]``, verified. ``deterministic``: the most probable tokens."""
        return self._data(*self._generate(policy, prompts, question, tag, deterministic, generator))

    def complete(self, policy: TokenPolicy, prompts: Prompts, deterministic: bool = False) -> list[list[int]]:
        """One completion per prompt, not verified."""
        prompts = self._to_device(prompts)
        question = torch.arange(len(prompts), device=self.device)
        buffer, _, _, _, present = self._generate(policy, prompts, question, "complete", deterministic, None)
        length = present.sum(0).long().tolist()
        return [row[:n] for row, n in zip(buffer.action.t().tolist(), length)]

    @torch.no_grad()
    def _generate(
        self, policy: TokenPolicy, prompts: Prompts, question: Tensor, tag: str, deterministic: bool,
        generator: torch.Generator | None,
    ) -> tuple[RolloutBuffer, Prompts, Tensor, Tensor, Tensor]:  # fmt: skip
        """The buffer with tokens and flags, ``prompts`` and ``question`` again, ``valid``, ``present`` ``[T, N]``."""
        buffer = self._buffer(tag, question.shape[0])
        temperature: float = policy.temperature  # type: ignore[attr-defined]
        n, steps, eos = question.shape[0], self.steps, self.task.vocab.eos
        talk = self.task if isinstance(self.task, ConversationTask) else None
        # one uniform number per token, whatever rows still run: dropping finished rows changes no sample
        noise = torch.rand(steps, n, generator=self.generator if generator is None else generator, device=self.device)
        forced = torch.full((steps, n), -1, device=self.device) if talk is not None else None
        valid = torch.zeros(steps, n, device=self.device)
        present = torch.zeros_like(valid)
        buffer.clear(0)
        buffer.action.fill_(self.task.vocab.pad if not self._fixed else 0)
        for column in buffer.extra.values():
            column.zero_()
        rows = torch.arange(n, device=self.device)
        here: Tensor | slice = slice(None)  # rows, as long as they are all of them: views are cheaper than gathers
        running = torch.ones(n, dtype=torch.bool, device=self.device)
        state, logits = policy.start(prompts, question, steps)
        every = 1 if self.device.type == "cpu" else LOOK
        for t in range(steps):
            log_probs = (logits.float() / temperature).log_softmax(-1)
            token = log_probs.argmax(-1) if deterministic else _draw(log_probs, noise[t, here])
            chosen = running
            if forced is not None:
                reply = forced[t, here]
                token, chosen = torch.where(reply >= 0, reply, token), running & (reply < 0)
            buffer.action[t, here] = torch.where(running, token, buffer.action[t, here])
            buffer.extra["log_prob"][t, here] = _chosen(log_probs, token) * chosen
            if self._entropy:
                buffer.extra["entropy"][t, here] = entropy_of(log_probs) * chosen
            valid[t, here] = chosen.float()
            present[t, here] = running.float()
            ends = chosen & (token == eos)
            if talk is not None and forced is not None:
                ends |= self._reply(talk, prompts, question, buffer, forced, rows, chosen & (token == talk.turn), t)
            last = t + 1 == steps
            buffer.terminated[t, here] = running & ends if not (last and self._fixed) else running
            if last:
                buffer.truncated[t, here] = running & ~ends & (not self._fixed)
                break
            context = running.float()
            running = running & ~ends
            if (t + 1) % every == 0:
                left = int(running.sum())
                if left == 0:
                    break
                if left <= COMPACT * rows.shape[0]:
                    still = running.nonzero().squeeze(-1)
                    rows, token, context, running = rows[still], token[still], context[still], running[still]
                    here, state = rows, policy.keep(state, still)
            state, logits = policy.step(state, token, context)
        return buffer, prompts, question, valid, present

    def _reply(
        self, task: ConversationTask, prompts: Prompts, question: Tensor, buffer: RolloutBuffer, forced: Tensor,
        rows: Tensor, asked: Tensor, t: int,
    ) -> Tensor:  # fmt: skip
        """Force the environment's replies into the columns that asked; ``[R]`` bool: whose episode ends instead."""
        ends = torch.zeros_like(asked)
        for i in asked.nonzero().squeeze(-1).tolist():
            n = int(rows[i])
            answer = task.respond(prompts.truth[int(question[n])], buffer.action[: t + 1, n].tolist())
            if answer is None:
                ends[i] = True
                continue
            answer = answer[: self.steps - t - 1]
            forced[t + 1 : t + 1 + len(answer), n] = torch.tensor(answer, dtype=forced.dtype, device=self.device)
        return ends

    def _demonstrate(self, prompts: Prompts, question: Tensor, tag: str) -> Data:
        """The questions' demonstrations as columns; a question without one gives a column without valid rows."""
        if prompts.demonstration is None:
            raise ValueError(f"task {self.task.name!r} has no demonstrations; methods that imitate need some")
        buffer = self._buffer(tag, question.shape[0])
        buffer.clear(0)
        for column in buffer.extra.values():
            column.zero_()
        width = min(self.steps, prompts.demonstration.shape[1])
        tokens = prompts.demonstration[question, :width].t()
        pad = -1 if self._fixed else self.task.vocab.pad
        buffer.action.fill_(max(pad, 0))
        buffer.action[:width] = tokens.clamp_min(0)
        valid = torch.zeros(self.steps, question.shape[0], device=self.device)
        # up to the end token, which may be the pad token: the first pad ends the row, the end token is part of it
        ended = (tokens == self.task.vocab.eos).cumsum(0) - (tokens == self.task.vocab.eos).long()
        valid[:width] = ((ended == 0) & ((tokens != pad) | (tokens == self.task.vocab.eos))).float().cumprod(0)
        length = valid.sum(0).long()
        some = (length > 0).nonzero().squeeze(-1)
        buffer.terminated[length[some] - 1, some] = True
        return self._data(buffer, prompts, question, valid, valid.clone(), demonstration=True)

    # -- columns ------------------------------------------------------------------------------------------------------

    def _buffer(self, tag: str, n: int) -> RolloutBuffer:
        if (tag, n) not in self._buffers:
            tokens: gym.Space[Any] = gym.spaces.Discrete(self.task.vocab.size)
            fields = (Field("log_prob"), *((Field("entropy"),) if self._entropy else ()))
            self._buffers[tag, n] = RolloutBuffer(
                self.steps, n, tokens, tokens, fields=fields, device=self.device, keep_final_obs=False
            )
        return self._buffers[tag, n]

    def _data(
        self, buffer: RolloutBuffer, prompts: Prompts, question: Tensor, valid: Tensor, present: Tensor,
        demonstration: bool = False,
    ) -> Data:  # fmt: skip
        n = question.shape[0]
        length = present.sum(0).long()
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
        # what lies after the end of a column belongs to no episode
        steps = {k: data[k][:longest] for k in data if k not in data.sequence and k != "obs"}
        steps |= {"valid": valid[:longest], "present": present[:longest], "carry": steps["carry"] * present[:longest]}
        sequence = {
            "prompt": prompts.tokens[question], "prompt_valid": prompts.valid[question], "group": question,
            "index": prompts.index[question], "episode_reward": total, "reward_components": components, "answer":
            answer, "length": length,
            "capped": buffer.truncated.any(0), "demonstration": torch.full_like(total, float(demonstration)),
        }  # fmt: skip
        return Data(steps | sequence, sequence=frozenset(sequence))

    def _to_device(self, prompts: Prompts) -> Prompts:
        demonstration = None if prompts.demonstration is None else prompts.demonstration.to(self.device)
        return replace(
            prompts, tokens=prompts.tokens.to(self.device), valid=prompts.valid.to(self.device),
            index=prompts.index.to(self.device), demonstration=demonstration,
        )  # fmt: skip

    def test_prompts(self, n: int, seed: int, split: Split = "test") -> Prompts:
        """Questions that training does not move: decided by ``seed`` alone."""
        return self._to_device(self.task.prompts(n, torch.Generator().manual_seed(seed), split))

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(), "prompt_generator": self.prompt_generator.get_state(),
            "total_steps": self.total_steps, "tokens": self.tokens,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
        self.prompt_generator.set_state(state["prompt_generator"].cpu())
        self.total_steps, self.tokens = state["total_steps"], state["tokens"]


def _draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF samples ``[R]``; sums in float64: in float32 the tail of a large vocabulary would lose its mass."""
    cdf = log_probs.double().exp().cumsum(-1)
    at = uniform.double().unsqueeze(-1) * cdf[..., -1:]
    return torch.searchsorted(cdf, at, right=True).squeeze(-1).clamp_max(cdf.shape[-1] - 1)


def _chosen(log_probs: Tensor, token: Tensor) -> Tensor:
    return log_probs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
