"""EPO: how steady the entropy is over a chain of twelve decisions with one reward at the end and one network for all of
them: without an entropy bonus, with one, and with the corridor."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.terms import Outputs
from ccrl.llm.policy import OUTPUTS, token_outputs
from ccrl.llm.task import Prompts
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.tables import History, train

check_siblings("agents", "envs")

from agents.llm.epo import EPO
from envs.text.bandits import TokenBandit

STEPS, ACTIONS, UPDATES = 12, 6, 150
KEY, DOOR = (4, 2), (9, 4)
"""Place and action of the key and of the door, which opens with the key alone."""


class KeyDoor(TokenBandit):
    """Reward 1 if the key was taken at its place and the door opened at its own; the other ten actions do nothing."""

    name = "key_door"

    def __init__(self) -> None:
        super().__init__(1, STEPS, ACTIONS)

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return ((tokens[KEY[0]] == KEY[1]) & (tokens[DOOR[0]] == DOOR[1])).float()


class SharedNetwork(nn.Module):
    """Logits from the place and whether the key is held, by one network for all places."""

    unit = "sequence"
    temperature = 1.0

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        head = nn.Linear(width, ACTIONS)
        nn.init.zeros_(head.weight)
        self.layers = nn.Sequential(nn.Linear(STEPS + 1, width), nn.Tanh(), head)

    def outputs(self) -> frozenset[str]:
        return OUTPUTS - {"hidden"}

    def logits(self, place: Tensor, held: Tensor) -> Tensor:
        """``[..., 6]`` of places (int64) and whether the key is held (bool), of one shape."""
        where = F.one_hot(place.clamp_max(STEPS - 1), STEPS).float()
        found: Tensor = self.layers(torch.cat([where, held.to(where.dtype).unsqueeze(-1)], -1))
        return found

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """``want`` ``[T', B, ...]``."""
        tokens = batch["action"]
        place = torch.arange(len(tokens)).unsqueeze(1).expand(tokens.shape)
        held = (place > KEY[0]) & (tokens[KEY[0]] == KEY[1])
        return token_outputs(self.logits(place, held), tokens, want, self.temperature, 6)

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        held = torch.zeros_like(question, dtype=torch.bool)
        return (0, held), self.logits(torch.zeros_like(question), held)

    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        t, held = state
        held = held | (token == KEY[1]) if t == KEY[0] else held
        return (t + 1, held), self.logits(torch.full_like(token, t + 1), held)

    def keep(self, state: Any, rows: Tensor) -> Any:
        return state[0], state[1][rows]


def go(seed: int, **options: Any) -> History:
    """One training run."""
    config = EPO.Settings(model="tabular", n_prompts=8, group_size=8, n_epochs=4, learning_rate=0.01, kl_coef=0.0,
                          **options)  # fmt: skip

    def table(task: Any) -> nn.Module:
        torch.manual_seed(seed)
        return SharedNetwork()

    return train(EPO, KeyDoor(), config, UPDATES, seed, table)


def swing(history: History) -> float:
    """Standard deviation of the rollout's mean entropy over the last 100 updates, nats per token."""
    return float(torch.tensor([row["train/rollout_entropy"] for row in history.stats[-100:]]).std())


def run(seeds: list[int]) -> list[Measurement]:
    """The three variants."""
    bonus: dict[str, Any] = {"entropy_coef": 0.05}
    none = [go(seed, entropy_coef=0.0) for seed in seeds]
    alone = [go(seed, **bonus, alpha=0.0) for seed in seeds]
    both = [go(seed, **bonus, alpha=1.0, kappa_low=0.5, kappa_high=1.5) for seed in seeds]
    published = [go(seed, **bonus) for seed in seeds]

    def outside(runs: list[History]) -> tuple[float, ...]:
        return tuple(sum(r["train/outside_corridor"] for r in h.stats[-100:]) / 100.0 for h in runs)

    def gap(a: list[History], b: list[History]) -> tuple[float, ...]:
        return tuple(swing(x) - swing(y) for x, y in zip(a, b))

    falls = (-math.inf, 0.0)
    return [
        Measurement("deviation of the entropy over the last 100 updates, bonus and corridor minus no entropy term",
                    "< 0 (the claim)", falls, gap(both, none)),
        Measurement("the same, bonus and corridor minus bonus", "< 0 (the claim)", falls, gap(both, alone)),
        Measurement("success over the last 20 updates, bonus and corridor minus bonus", "no worse (the claim)",
                    (-0.02, math.inf), tuple(a.final() - b.final() for a, b in zip(both, alone))),
        Measurement("share of tokens outside the corridor (0.5, 1.5) over the last 100 updates",
                    "> 0: else it does nothing", (1e-6, math.inf), outside(both)),
        Measurement("share of tokens outside the published corridor (0, 2)",
                    "0: twice a mean above half of ln 6 is out of reach (derived)", (0.0, 0.0), outside(published)),
    ]  # fmt: skip
