"""One token after the other: the loop that writes completions into a buffer, and the replies of conversations."""

from __future__ import annotations

import torch
from torch import Tensor

from ccrl.buffer import RolloutBuffer
from ccrl.llm.policy import TokenPolicy, collision_of, entropy_of
from ccrl.llm.task import ConversationTask, Prompts, TextTask
from ccrl.llm.vocabulary import end_tokens

__all__ = ["COMPACT", "FIELDS", "LOOK", "decode", "truncate"]

FIELDS = {"entropy": entropy_of, "sum_pi2": collision_of}
"""Columns of the whole distribution that are written on the way, where a buffer has them."""

COMPACT = 0.75
"""Finished completions leave the computation when at most this share of the rows still runs."""
LOOK = 8
"""On an accelerator the host asks every so many tokens which rows still run: each question waits for the device."""


@torch.no_grad()
def decode(
    policy: TokenPolicy, task: TextTask, prompts: Prompts, question: Tensor, buffer: RolloutBuffer, noise: Tensor, *,
    fixed: bool = False, deterministic: bool = False, top_p: float = 1.0, top_k: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write a completion per entry of ``question`` ``[N]`` into a cleared ``buffer``: tokens, flags, ``log_prob`` and,
    where it has them, ``FIELDS``. Returns ``valid`` (chosen by the policy) and ``present`` (in the context)
    ``[T, N]``.

    :param noise: ``[T, N]`` uniform numbers, one per token whatever rows still run: dropping finished rows changes no
        sample.
    :param fixed: the last position is the end, not a cut.
    :param deterministic: the most probable tokens.
    :param top_p, top_k: what samples are drawn from, see ``truncate``; ``log_prob`` stays that of the whole
        distribution.
    """
    steps, n = noise.shape
    device = noise.device
    temperature: float = policy.temperature  # type: ignore[attr-defined]
    ending = torch.tensor(end_tokens(task.vocab), dtype=torch.int64, device=device)
    talk = _Conversation(task, prompts, question, steps, device) if isinstance(task, ConversationTask) else None
    described = [(buffer.extra[name], of) for name, of in FIELDS.items() if name in buffer.extra]
    valid = torch.zeros(steps, n, device=device)
    present = torch.zeros_like(valid)
    rows = torch.arange(n, device=device)
    here: Tensor | slice = slice(None)  # rows, as long as they are all of them: views are cheaper than gathers
    running = torch.ones(n, dtype=torch.bool, device=device)
    state, logits = policy.start(prompts, question, steps)
    every = 1 if device.type == "cpu" else LOOK
    for t in range(steps):
        log_probs = (logits.float() / temperature).log_softmax(-1)
        token = log_probs.argmax(-1) if deterministic else _draw(truncate(log_probs, top_p, top_k), noise[t, here])
        chosen = running
        if talk is not None:
            reply = talk.forced[t, here]
            token, chosen = torch.where(reply >= 0, reply, token), running & (reply < 0)
        buffer.action[t, here] = torch.where(running, token, buffer.action[t, here])
        buffer.extra["log_prob"][t, here] = _chosen(log_probs, token) * chosen
        for column, of in described:
            column[t, here] = of(log_probs) * chosen
        valid[t, here] = chosen.float()
        present[t, here] = running.float()
        ends = chosen & (token.unsqueeze(-1) == ending).any(-1)
        if talk is not None:
            # the turn token may be an end token: there it is for the reply to say whether the episode ends
            asked = chosen & (token == talk.task.turn)
            ends = (ends & ~asked) | talk.reply(buffer.action, rows, asked, t)
        last = t + 1 == steps
        buffer.terminated[t, here] = running & ends if not (last and fixed) else running
        if last:
            buffer.truncated[t, here] = running & ~ends & (not fixed)
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
    return valid, present


class _Conversation:
    """The environment's replies, forced into the columns that asked for them: ``forced`` ``[T, N]``, -1 elsewhere."""

    def __init__(
        self, task: ConversationTask, prompts: Prompts, question: Tensor, steps: int, device: torch.device
    ) -> None:
        self.task, self.prompts, self.question, self.steps = task, prompts, question, steps
        self.forced = torch.full((steps, question.shape[0]), -1, device=device)

    def reply(self, action: Tensor, rows: Tensor, asked: Tensor, t: int) -> Tensor:
        """``[R]`` bool: whose episode ends instead."""
        ends = torch.zeros_like(asked)
        for i in asked.nonzero().squeeze(-1).tolist():
            n = int(rows[i])
            answer = self.task.respond(self.prompts.truth[int(self.question[n])], action[: t + 1, n].tolist())
            if answer is None:
                ends[i] = True
                continue
            answer = answer[: self.steps - t - 1]
            written = torch.tensor(answer, dtype=self.forced.dtype, device=self.forced.device)
            self.forced[t + 1 : t + 1 + len(answer), n] = written
        return ends


def truncate(log_probs: Tensor, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """``log_probs`` ``[R, V]`` with -inf on all but the ``top_k`` most probable tokens (0: all), and of these on all
    but the smallest set of most probable ones with at least ``top_p`` of their probability (Holtzman et al. 2020). Not
    normalised again; tokens as probable as the last one stay."""
    if 0 < top_k < log_probs.shape[-1]:
        least = log_probs.topk(top_k).values[..., -1:]
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
    if top_p < 1.0:
        ordered = log_probs.log_softmax(-1).sort(-1, descending=True).values
        mass = ordered.double().exp()
        inside = mass.cumsum(-1) - mass < top_p  # what is before a token, so that the first one always stays
        place = inside.sum(-1, keepdim=True) - 1
        least = log_probs.sort(-1, descending=True).values.gather(-1, place)
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
    return log_probs


def _draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF samples ``[R]``; sums in float64: in float32 the tail of a large vocabulary would lose its mass."""
    cdf = log_probs.double().exp().cumsum(-1)
    at = uniform.double().unsqueeze(-1) * cdf[..., -1:]
    return torch.searchsorted(cdf, at, right=True).squeeze(-1).clamp_max(cdf.shape[-1] - 1)


def _chosen(log_probs: Tensor, token: Tensor) -> Tensor:
    return log_probs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
