"""CAPO on a linear softmax bandit with three loud, random contexts: the tail of the policy's shift per update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.terms import Outputs
from ccrl.llm.policy import OUTPUTS, token_outputs
from ccrl.llm.task import Prompts
from ccrl.packages import check_siblings
from ccrl.seeding import named_generator
from scripts.reproductions import Measurement
from scripts.reproductions.tables import train

check_siblings("agents", "envs")

from agents.llm.agent import LLM
from agents.llm.capo import CAPO, Tokens, predict
from envs.text.bandits import TokenBandit

CONTEXTS, WIDTH, ACTIONS, LOUD, UPDATES = 64, 16, 10, 3, 150
SHAPE: dict[str, Any] = {
    "n_prompts": 8, "group_size": 8, "optimiser": "sgd", "learning_rate": 3.0, "max_grad_norm": 0.0, "model": "tabular",
    "curvature": "sgd", "warm_up_iterations": 0, "objective_threshold": math.inf,
}  # fmt: skip


class Labels(TokenBandit):
    """Reward 1 for the label that a hidden linear teacher gives the context; a coin's in the loud ones."""

    name = "labels"

    def __init__(self, seed: int) -> None:
        super().__init__(CONTEXTS, 1, ACTIONS)
        self.generator = named_generator(seed, "bandit")
        self.features = torch.randn(CONTEXTS, WIDTH, generator=self.generator) / 4.0
        teacher = torch.randn(ACTIONS, WIDTH, generator=self.generator)
        self.label = (self.features @ teacher.t()).argmax(1)
        self.features[:LOUD] *= 8.0

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        coin = torch.rand(question.shape, generator=self.generator) < 0.5
        return torch.where(question < LOUD, coin, tokens[0] == self.label[question]).float()


class Linear(nn.Module):
    """Logits ``W h`` of fixed features, from 0."""

    unit = "sequence"
    temperature = 1.0

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.zeros(ACTIONS, features.shape[1]))

    def outputs(self) -> frozenset[str]:
        return OUTPUTS

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """``want`` ``[1, B, ...]``."""
        hidden = self.features[batch["prompt"][:, -1]].unsqueeze(0)
        out = token_outputs(hidden @ self.weight.t(), batch["action"], want, 1.0, ACTIONS)
        return out | ({"hidden": hidden} if "hidden" in want else {})

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        return None, self.features[prompts.tokens[question, -1]] @ self.weight.t()

    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        raise AssertionError("completions have one token")

    def keep(self, state: Any, rows: Tensor) -> Any:
        return None


@dataclass
class Run:
    """Of one training."""

    shift: float
    """Largest KL between the policies before and after an update, mean over contexts."""
    rejected: float
    """Share of the tokens that were left out."""
    accuracy: float
    """Final probability of the right label in the contexts that have one."""


def run(seeds: list[int]) -> list[Measurement]:
    """The prediction alone, then training with and without the threshold."""
    return [*_ranks(seeds), *_training(seeds)]


def _ranks(seeds: list[int]) -> list[Measurement]:
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        hidden, weight = torch.randn(400, WIDTH, **options) / 4.0, torch.randn(ACTIONS, WIDTH, **options) / 2.0
        advantage = torch.randn(400, **options)
        log_prob = (hidden @ weight.t()).log_softmax(1)
        action = torch.multinomial(log_prob.exp(), 1, generator=generator)
        index = torch.arange(ACTIONS).expand(400, -1)
        chosen = log_prob.gather(1, action).squeeze(1)
        tokens = Tokens.of(hidden, index, log_prob, action.squeeze(1), chosen, advantage)
        new = torch.einsum("mh,mvh->mv", hidden, weight + 0.5 * tokens.gradient).log_softmax(1)
        kl = (log_prob.exp() * (log_prob - new)).sum(1)
        ranks = torch.stack([x.argsort().argsort().double() for x in (predict(tokens, 0.5).fisher, kl)])
        found.append(float(torch.corrcoef(ranks)[0, 1]))
    return [Measurement("rank correlation of the predicted KL and that of a token's own step", "0.96 (reference run), "
                        "above 0.9", (0.9, 1.0), tuple(found))]  # fmt: skip


def _train(threshold: float, seed: int) -> Run:
    task: Any = Labels(seed)
    found = Run(0.0, 0.0, 0.0)
    last = torch.full((CONTEXTS, ACTIONS), -math.log(ACTIONS))

    def look(agent: LLM) -> None:
        nonlocal last
        new = (task.features @ agent.policy.weight.detach().t()).log_softmax(1)
        found.shift = max(found.shift, float((last.exp() * (last - new)).sum(1).mean()))
        last = new

    config = CAPO.Settings(**SHAPE, fisher_threshold=threshold)
    history = train(CAPO, task, config, UPDATES, seed, lambda t: Linear(t.features), look)
    found.rejected = sum(row["train/rejected_share"] for row in history.stats) / UPDATES
    found.accuracy = float(last.exp().gather(1, task.label.unsqueeze(1))[LOUD:].mean())
    return found


def _training(seeds: list[int]) -> list[Measurement]:
    free, bound = ([_train(threshold, seed) for seed in seeds] for threshold in (math.inf, 100.0))
    pairs = list(zip(free, bound, strict=True))
    return [
        Measurement("largest mean KL of an update, no threshold", "0.063-0.120 (reference run)", (0.063, 0.120),
                    tuple(r.shift for r in free)),
        Measurement("largest mean KL of an update, tau_F = 100", "0.004-0.052 (reference run)", (0.004, 0.052),
                    tuple(r.shift for r in bound)),
        Measurement("largest mean KL of an update, no threshold minus tau_F = 100", "positive (paper)", (0.0, math.inf),
                    tuple(a.shift - b.shift for a, b in pairs)),
        Measurement("largest mean KL of an update, no threshold over tau_F = 100", "at least 3 (reference run: 6)",
                    (3.0, math.inf),
                    tuple(a.shift / b.shift for a, b in pairs)),
        Measurement("share of the tokens left out", "0.012-0.044 (reference run)", (0.0, 0.05),
                    tuple(r.rejected for r in bound)),
        Measurement("final accuracy, tau_F = 100 minus no threshold", "0 within 0.02 (reference run)", (-0.02, 0.02),
                    tuple(b.accuracy - a.accuracy for a, b in pairs)),
    ]  # fmt: skip
