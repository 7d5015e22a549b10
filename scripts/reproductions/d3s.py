"""D3S: what its selection keeps, in simulation, and learning per gradient token on a bandit of mixed difficulty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import Outputs
from ccrl.llm.policy import OUTPUTS, token_outputs
from ccrl.llm.task import Prompts
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.tables import History, train

check_siblings("agents", "envs")

from agents.llm.agent import LLMMethod
from agents.llm.baselines import GRPO
from agents.llm.d3s import D3S, keep_rollouts
from envs.text import make_task

BATCHES = 200
UPDATES = 150
SHAPE: dict[str, Any] = {"n_prompts": 32, "group_size": 16, "learning_rate": 0.03, "aggregate": "token_mean",
                         "model": "tabular"}  # fmt: skip


class SharedPolicy(nn.Module):
    """A perceptron of two layers on the embedding of the question, the position and the sum of the tokens so far."""

    unit = "sequence"
    temperature = 1.0

    def __init__(self, questions: int, length: int, symbols: int, width: int = 64) -> None:
        super().__init__()
        self.symbols = symbols
        self.question = nn.Embedding(questions, width)
        self.place = nn.Embedding(length, width)
        self.memory = nn.Embedding(symbols, width)
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, symbols))

    def outputs(self) -> frozenset[str]:
        return OUTPUTS - {"hidden"}

    def _logits(self, row: Tensor, place: Tensor, memory: Tensor) -> Tensor:
        logits: Tensor = self.head(self.question(row) + self.place(place) + self.memory(memory))
        return logits

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """``want`` ``[T', B, ...]``."""
        tokens, row = batch["action"], batch["prompt"][:, -1]
        memory = (tokens.cumsum(0) - tokens) % self.symbols
        place = torch.arange(len(tokens)).unsqueeze(1).expand_as(tokens)
        logits = self._logits(row.expand_as(tokens), place, memory)
        return token_outputs(logits, tokens, want, 1.0, 16)

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        row = prompts.tokens[question, -1]
        zero = torch.zeros_like(row)
        return (row, zero, zero), self._logits(row, zero, zero)

    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        row, place, memory = state
        place, memory = place + 1, (memory + token) % self.symbols
        return (row, place, memory), self._logits(row, place, memory)

    def keep(self, state: Any, rows: Tensor) -> Any:
        return tuple(x[rows] for x in state)


def run(seeds: list[int]) -> list[Measurement]:
    """The selection alone, then training."""
    return [*_selection(seeds), *_training(seeds)]


def _selection(seeds: list[int]) -> list[Measurement]:
    stage, group = GroupBaseline(scale="std", ddof=0), torch.arange(32).repeat_interleave(16)
    rows: list[list[float]] = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            rate = torch.distributions.Beta(0.4, 0.4).sample((BATCHES, 32)).repeat_interleave(16, 1)
            rewards = torch.bernoulli(rate)
        found = []
        for reward in rewards:
            advantage = stage.advantages(reward, group)
            kept = advantage[keep_rollouts(advantage, group, 16, 0.25)]
            found.append([float(x) for x in ((advantage != 0).float().mean(), (kept != 0).float().mean(),
                                             advantage.var(correction=0), kept.var(correction=0))])  # fmt: skip
        rows.append(torch.tensor(found).mean(0).tolist())
    cases = (
        # 1 - E[p^16 + (1 - p)^16] = 1 - 2 B(16.4, 0.4) / B(0.4, 0.4); standardised groups have the variance 1 or 0
        ("share of useful rollouts, all", 0.65, 0.02, "closed form"),
        ("share of useful rollouts, kept quarter of all", 1.0, 1e-3, "reference run"),
        ("variance of advantages, all", 0.65, 0.02, "closed form"),
        ("variance of advantages, kept quarter of all", 2.25, 0.1, "reference run"),
    )
    return [
        Measurement(name, f"{value:g} ({source})", (value - room, value + room), tuple(row[i] for row in rows))
        for i, (name, value, room, source) in enumerate(cases)
    ]


def _run(method: LLMMethod, config: Any, seed: int) -> tuple[History, list[float]]:
    """Also the gradient tokens spent up to each update, in those of a whole rollout."""
    task: Any = make_task("sum_rule")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        history = train(method, task, config, UPDATES, seed, lambda t: SharedPolicy(256, 4, 16))
    tokens = torch.tensor([row.get("train/token_share", 1.0) for row in history.stats])
    return history, tokens.cumsum(0).tolist()


def _gain(history: History, upto: int) -> float:
    """Rise of the reward from the first update to the last ones before ``upto``."""
    return sum(history.reward[upto - 10 : upto]) / 10 - history.reward[0]


def _training(seeds: list[int]) -> list[Measurement]:
    late = {"rollouts_init": 0.25, "rollouts_final": 0.25, "tokens_init": 0.2, "tokens_final": 0.2}
    alone = {"tokens_init": 1.0, "tokens_final": 1.0, "batch_share": 1.0}
    methods = {"GRPO": (GRPO, GRPO.Settings(**SHAPE)), "D3S": (D3S, D3S.Settings(**SHAPE)),
               "D2S": (D3S, D3S.Settings(**SHAPE | late)), "D1S": (D3S, D3S.Settings(**SHAPE | alone))}  # fmt: skip
    runs = {name: [_run(method, config, seed) for seed in seeds] for name, (method, config) in methods.items()}
    early = UPDATES // 5

    def gap(one: str, other: str, at: int, per_token: bool = False) -> tuple[float, ...]:
        def value(run: tuple[History, Sequence[float]]) -> float:
            return _gain(run[0], at) / (run[1][at - 1] if per_token else 1.0)

        return tuple(value(a) - value(b) for a, b in zip(runs[one], runs[other]))

    share = tuple(tokens[-1] / UPDATES for _, tokens in runs["D3S"])
    useful = {
        name: tuple(sum(row[f"train/{name}"] for row in h.stats) / UPDATES for h, _ in runs["D3S"])
        for name in ("useful_sampled", "useful_kept")
    }
    return [
        Measurement("D3S: share of the tokens with a gradient, whole run", "below 0.2 (paper)",
                    (-math.inf, 0.2), share),
        Measurement("D3S in training: share of useful rollouts, kept minus sampled",
                    "positive (paper, of its own models: about 1 and 0.7)", (0.0, math.inf),
                    tuple(k - s for k, s in zip(useful["useful_kept"], useful["useful_sampled"]))),
        Measurement("reward gained per gradient token after a fifth of the run, D3S minus GRPO", "positive (paper)",
                    (0.0, math.inf), gap("D3S", "GRPO", early, per_token=True)),
        Measurement("reward gained after a fifth of the run, D3S minus GRPO", "positive (paper: faster early)",
                    (0.0, math.inf), gap("D3S", "GRPO", early)),
        Measurement("reward gained after a fifth of the run, D1S minus GRPO", "positive (paper: faster early)",
                    (0.0, math.inf), gap("D1S", "GRPO", early)),
        Measurement("reward gained in the whole run, D3S minus GRPO", "positive (paper)", (0.0, math.inf),
                    gap("D3S", "GRPO", UPDATES)),
        Measurement("reward gained in the whole run, D3S minus D2S", "positive (paper: no schedule is overtaken)",
                    (0.0, math.inf), gap("D3S", "D2S", UPDATES)),
    ]  # fmt: skip
