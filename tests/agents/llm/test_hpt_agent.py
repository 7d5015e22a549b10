"""HPT trained: demonstrations, skipped gradients, exact resume, texts of different lengths, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.llm.agent import LLM
from agents.llm.hpt import HPT, HPTConfig, HPTRecipe
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.modulations import shaping
from ccrl.llm.policy import token_outputs
from ccrl.llm.task import Prompts

SMALL: dict[str, Any] = {"model": "tabular", "n_prompts": 8, "group_size": 8, "learning_rate": 0.2}
DEAD: dict[str, Any] = {"questions": 8, "fixed_length": 4, "symbols": 12, "smallest": 5, "largest": 6}


def test_demonstrations_are_asked_for_once(recipe: Any) -> None:
    made = recipe(HPTRecipe, HPTConfig())
    first = made.plan({}, {}, None)
    assert first == [made.parts.request]
    (second,) = made.plan({}, {"on": Data({})}, None)
    assert (second.tag, second.source, second.demonstrations) == ("demo", "on", True)
    assert isinstance(second, Request)
    assert second.counts.tolist() == [1]
    assert made.plan({}, {"on": Data({}), "demo": Data({})}, None) == []
    assert recipe(HPTRecipe, HPTConfig(gate=-1.0)).plan({}, {"on": Data({})}, None) == []


def test_solves_what_exploration_does_not() -> None:
    found = {}
    for gate in (0.0, -1.0):
        agent = HPT("dead_prompts", HPT.Settings(**SMALL, gate=gate), seed=1, env_kwargs=DEAD)
        agent.learn(until=agent.samples_per_iteration)
        first = float(agent.scalars["train/sft_share"])
        agent.learn(until=60 * agent.samples_per_iteration)
        found[gate] = agent.pass_at([1], questions=8, samples=64)["pass@1"]
        assert float(agent.scalars["train/sft_share"]) < max(first, 1e-9)
        assert 0.0 <= float(agent.scalars["rollout/success"]) <= 1.0
    assert found[0.0] > 0.85
    assert found[-1.0] < 0.75  # 3 of 8 questions are dead


def test_large_gradients_are_skipped_and_counted(tmp_path: Path) -> None:
    agent = HPT("dead_prompts", HPT.Settings(**SMALL, skip_grad_norm=1e-6), seed=1, env_kwargs=DEAD)
    agent.learn(until=2 * agent.samples_per_iteration)
    assert not agent.policy.logits.any()
    assert float(agent.scalars["train/grad_norm"]) > 1e-6
    assert agent.scalars["train/skipped_updates"] == agent.scalars["train/n_updates"] == 2
    agent.save(tmp_path / "agent.pt")
    loaded = HPT.load(tmp_path / "agent.pt")
    loaded.updaters["policy"].skip_norm = None
    loaded.learn(until=3 * agent.samples_per_iteration)
    assert loaded.policy.logits.any()
    assert loaded.scalars["train/skipped_updates"] == 2  # over the whole run, as n_updates
    assert loaded.scalars["train/n_updates"] == 3


def test_the_threshold_is_for_the_norm_before_it_is_scaled_down() -> None:
    """With max_grad_norm far below the threshold: scaled norms would never exceed it."""
    found = {}
    for threshold in (1e-3, 1e3):
        config = HPT.Settings(**SMALL | {"max_grad_norm": 1e-4}, skip_grad_norm=threshold)
        agent = HPT("dead_prompts", config, seed=1, env_kwargs=DEAD)
        agent.learn(until=agent.samples_per_iteration)
        assert 1e-3 < float(agent.scalars["train/grad_norm"]) < 1e3
        found[threshold] = agent.scalars["train/skipped_updates"]
    assert found == {1e-3: 1, 1e3: 0}


@pytest.mark.parametrize("mixture", ["switch", "srft"])
def test_resumes_exactly(resumes: Any, tmp_path: Any, mixture: str) -> None:
    resumes(HPT, "dead_prompts", HPT.Settings(**SMALL, mixture=mixture, batch_size=16), tmp_path / "agent.pt")


class Bigram(nn.Module):
    """Logits from the last token alone: completions of different lengths without a language model's start-up time."""

    unit, temperature = "sequence", 1.0

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(symbols, symbols))

    def outputs(self) -> frozenset[str]:
        return frozenset({"log_prob", "entropy"})

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        token = batch["action"]
        before = torch.cat([batch["prompt"][:, -1].unsqueeze(0), token[:-1]])
        return token_outputs(self.logits[before], token, want, 1.0, 1)

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[None, Tensor]:
        return None, self.logits[prompts.tokens[question, -1]]

    def step(self, state: None, token: Tensor, present: Tensor) -> tuple[None, Tensor]:
        return None, self.logits[token]

    def keep(self, state: None, rows: Tensor) -> None:
        return None


class OnBigrams(LLM.of(HPT)):  # type: ignore[misc]
    def make_model(self) -> nn.Module:
        return Bigram(self.task.vocab.size)


def test_imitation_of_texts_of_different_lengths() -> None:
    """Everything gated: the loss is the mean negative log-likelihood of the demonstrations' tokens."""
    config = HPT.Settings(n_prompts=16, group_size=2, gate=1.0, entropy_coef=0.0, learning_rate=0.1, max_grad_norm=0.0)
    agent = OnBigrams("arithmetic", config, seed=0)
    agent.learn(until=agent.samples_per_iteration)
    assert float(agent.scalars["train/sft_loss"]) == pytest.approx(math.log(agent.task.vocab.size), rel=1e-5)
    agent.learn(until=60 * agent.samples_per_iteration)
    prompts = agent.task.prompts(64, torch.Generator().manual_seed(5), "train")
    tokens, mask = prompts.demonstration, prompts.demonstration_valid
    assert tokens is not None
    assert mask is not None
    before = torch.cat([prompts.tokens[:, -1:], tokens[:, :-1]], 1)
    nll = -agent.policy.logits.log_softmax(-1)[before, tokens][mask > 0].mean()
    nll = nll.detach()
    assert float(nll) == pytest.approx(float(agent.scalars["train/sft_loss"]), abs=0.3)
    assert float(nll) < 0.7 * math.log(agent.task.vocab.size)


def test_bad_settings_are_refused() -> None:
    for settings, message in (
        ({"mixture": "half"}, "mixture: expected one of"),
        ({"rl_norm": "batch"}, "rl_norm: expected"),
        ({"rl_share": 1.5}, "rl_share: expected a number in"),
        ({"gate": 2.0}, "gate: expected"),
        ({"sft_coef": -1.0}, "sft_coef: expected >= 0"),
        ({"skip_grad_norm": -1.0}, "skip_grad_norm: expected >= 0"),
        ({"shape": 0.0}, "shape: expected > 0"),
        ({"kl_coef": 0.1}, "kl_coef: expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            HPT.Settings(**settings)
    with pytest.raises(ValueError, match="expected gamma > 0"):
        shaping(0.0)


def test_tasks_without_demonstrations_are_refused() -> None:
    with pytest.raises(ValueError, match="no demonstrations"):
        HPT("modsum", HPT.Settings(**SMALL))
    HPT("modsum", HPT.Settings(**SMALL, gate=-1.0)).learn(until=64)
