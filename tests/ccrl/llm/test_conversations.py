"""Conversations: replies are in the context, nobody trains on them, and they decide where an episode ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ccrl.collect import Request
from ccrl.data import Field
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.task import Prompts, Score, pad_left


class Scripted:
    """Tokens 0 and 1 are words, 2 asks for a reply, 3 ends. The reply to the first question is 1 0, to the second one
    token of 1, and the third ends the episode."""

    name, components, max_new_tokens, turn = "scripted", ("reward",), 12, 2

    class vocab:
        size, pad, bos, eos = 5, 4, 4, 3
        encode = decode = None

    def __init__(self, cut: int | None = None) -> None:
        self.heard: list[list[int]] = []
        self.max_new_tokens = cut or 12

    def prompts(self, n: int, generator: Any, split: Any = "train") -> Prompts:
        tokens, valid = pad_left([[1]] * n, 4)
        return Prompts(tokens, valid, torch.arange(n), tuple(range(n)))

    def respond(self, truth: Any, tokens: Sequence[int]) -> list[int] | None:
        self.heard.append([truth, *tokens])
        return {1: [1, 0], 2: [1]}.get(list(tokens).count(2))

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        return Score(torch.ones(len(question), 1), torch.zeros_like(question))


class Follows:
    """A policy that writes a script, whatever is replied: at position ``t`` the token ``script[t]``."""

    temperature = 1.0

    def __init__(self, script: Sequence[int]) -> None:
        self.script = script

    def logits(self, t: int, n: int) -> Tensor:
        logits = torch.full((n, 5), -9.0)
        logits[:, self.script[t]] = 9.0
        return logits

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        return [], self.logits(0, len(question))

    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        state.append(token.tolist())
        return state, self.logits(len(state), len(token))

    def keep(self, state: Any, rows: Tensor) -> Any:
        return state


def test_replies_are_present_and_not_trained_on() -> None:
    task, policy = Scripted(), Follows([0, 2, 3, 3, 0, 2, 3, 2, 0, 0, 0, 0])
    data = TokenCollector(task, seed=0).sample(policy, task.prompts(1, None), torch.zeros(1, dtype=torch.int64))
    # the replies 1 0 and 1 stand where the policy would have written end tokens
    assert data["action"][:, 0].tolist() == [0, 2, 1, 0, 0, 2, 1, 2]
    assert data["valid"][:, 0].tolist() == [1, 1, 0, 0, 1, 1, 0, 1]
    assert data["present"][:, 0].tolist() == [1.0] * 8
    assert data["length"].tolist() == [8]
    assert data["terminated"][:, 0].nonzero().flatten().tolist() == [7]
    assert not data["log_prob"][:, 0][data["valid"][:, 0] == 0].any()
    assert task.heard == [[0, 0, 2], [0, 0, 2, 1, 0, 0, 2], [0, 0, 2, 1, 0, 0, 2, 1, 2]]


def test_what_a_reply_says_has_no_effect() -> None:
    """An end token in a reply does not end the episode, a turn token there asks for nothing."""

    class Rude(Scripted):
        def respond(self, truth: Any, tokens: Sequence[int]) -> list[int] | None:
            super().respond(truth, tokens)
            return [3, 2, 1]

    task, policy = Rude(), Follows([0, 2, 0, 0, 0, 1, 3, 0, 0, 0, 0, 0])
    collector = TokenCollector(task, seed=0, fields=(Field("entropy"),))
    data = collector.collect(Request(counts=torch.tensor([1])), policy)
    assert data["action"][:, 0].tolist() == [0, 2, 3, 2, 1, 1, 3]
    assert data["valid"][:, 0].tolist() == [1, 1, 0, 0, 0, 1, 1]
    assert data["terminated"][:, 0].nonzero().flatten().tolist() == [6]
    assert len(task.heard) == 1
    assert not data["entropy"][data["valid"] == 0].any()
    assert collector.tokens == 4  # what was chosen, not what was replied


def test_a_turn_token_that_is_an_end_token() -> None:
    """As in many chat models: the reply decides whether the episode ends there."""

    class Chat(Scripted):
        turn = 3

        def respond(self, truth: Any, tokens: Sequence[int]) -> list[int] | None:
            return {1: [1, 0]}.get(list(tokens).count(3))

    task, policy = Chat(), Follows([0, 3, 1, 1, 0, 3, 0, 0, 0, 0, 0, 0])
    data = TokenCollector(task, seed=0).sample(policy, task.prompts(1, None), torch.zeros(1, dtype=torch.int64))
    assert data["action"][:, 0].tolist() == [0, 3, 1, 0, 0, 3]
    assert data["valid"][:, 0].tolist() == [1, 1, 0, 0, 1, 1]
    assert data["terminated"][:, 0].nonzero().flatten().tolist() == [5]


def test_a_reply_is_cut_at_the_cap() -> None:
    task, policy = Scripted(cut=3), Follows([0, 2, 0])
    data = TokenCollector(task, seed=0).sample(policy, task.prompts(1, None), torch.zeros(1, dtype=torch.int64))
    assert data["action"][:, 0].tolist() == [0, 2, 1]
    assert data["valid"][:, 0].tolist() == [1, 1, 0]
    assert data["capped"].tolist() == [True]
