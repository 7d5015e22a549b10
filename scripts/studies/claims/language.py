"""Claims of the methods for language models, on the tables and perceptrons of the papers' small experiments."""

from __future__ import annotations

from itertools import compress
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.llm.agent import LLM, LLMMethod
from agents.llm.baselines import GRPO, DrGRPO
from agents.llm.bnpo import BNPO
from agents.llm.d3s import D3S
from agents.llm.dcpo import DCPO
from agents.llm.empg import EMPG
from agents.llm.g2rpo import G2RPO
from agents.llm.gbpo import GBPO
from agents.llm.gdpo import GDPO
from agents.llm.hpt import HPT
from agents.llm.mhpo import MHPO
from agents.llm.real import REAL
from agents.llm.reinforce import RLOO
from agents.llm.riskpo import RiskPO
from ccrl.llm.tabular import TabularTokenPolicy
from envs.text import make_task
from envs.text.bandits import DeadPrompts, TokenBandit
from scripts.reproductions import bnpo, copg, d3s, g2rpo, gdpo, hpt
from scripts.reproductions.modsum import exact, modsum_shape
from scripts.reproductions.tables import StateTable, partial_sums, train
from scripts.studies.claims.claim import Arm, Claim

__all__ = ["CLAIMS"]


def rates(*values: float, **fixed: Any) -> tuple[dict[str, Any], ...]:
    """A grid of step sizes."""
    return tuple({"learning_rate": value, **fixed} for value in values)


# -- ModSum, rollouts used many times ---------------------------------------------------------------------------------


def modsum(method: LLMMethod, updates: int, last: int | None = None) -> Any:
    """Mean reward of all updates, or of the last ones."""

    def play(seed: int, **settings: Any) -> float:
        config = method.Settings(**modsum_shape(model="tabular", **settings))
        history = train(method, make_task("modsum"), config, updates, seed, partial_sums)
        return history.area if last is None else history.final(last)

    return play


MANY = {"n_epochs": 10, "clip_low": 0.3, "clip_high": 0.3}
GBPO_EPOCHS = Claim(
    "gbpo",
    "with ten epochs per rollout and bounds of 0.3, GBPO reaches a higher reward than GRPO",
    "ModSum, table, 60 updates of 16 x 8 completions, Adam; step size of all from five",
    "mean reward of the last 10 updates",
    (
        Arm("GBPO", modsum(GBPO, 60, 10), rates(0.02, 0.05, 0.1, 0.2, 0.4, **MANY)),
        Arm("GRPO", modsum(GRPO, 60, 10), rates(0.02, 0.05, 0.1, 0.2, 0.4, **MANY)),
        Arm("GBPO, 1 epoch, bounds 0.2", modsum(GBPO, 60, 10), rates(0.02, 0.05, 0.1, 0.2, 0.4)),
    ),
    (("GBPO", "GRPO"), ("GBPO", "GBPO, 1 epoch, bounds 0.2")),
)
REAL_AREA = Claim(
    "real",
    "bounded gradient weights learn faster than GRPO's at each one's best step size",
    "ModSum, table, 150 updates of 16 x 8 completions, 8 epochs, Adam; step size of both from five",
    "mean reward of all updates",
    (
        Arm("REAL", modsum(REAL, 150), rates(0.05, 0.1, 0.2, 0.4, 0.8, n_epochs=8)),
        Arm("GRPO", modsum(GRPO, 150), rates(0.05, 0.1, 0.2, 0.4, 0.8, n_epochs=8)),
    ),
    (("REAL", "GRPO"),),
)
MHPO_AREA = Claim(
    "mhpo",
    "the modulated ratio learns at least as well as the clip when a rollout is used sixteen times",
    "ModSum, table, 60 updates of 16 x 8 completions, 16 epochs, Adam; step size of both from four",
    "mean reward of all updates",
    (
        Arm("MHPO", modsum(MHPO, 60), rates(0.05, 0.1, 0.2, 0.4, n_epochs=16)),
        Arm("GRPO", modsum(GRPO, 60), rates(0.05, 0.1, 0.2, 0.4, n_epochs=16)),
    ),
    (("MHPO", "GRPO"),),
)


# -- bandits ----------------------------------------------------------------------------------------------------------


def success_rates(method: LLMMethod) -> Any:
    """Questions whose success rates are from Beta(2, 6); 60 updates."""

    def play(seed: int, **settings: Any) -> float:
        task = bnpo.Rates(seed)
        shape = {"model": "tabular", "n_prompts": 64, "group_size": 16, "max_grad_norm": 0.0, "optimiser": "sgd"}
        table = lambda task: TabularTokenPolicy(task.questions, 1, task.symbols, init=task.initial_logits())  # noqa: E731
        return train(method, task, method.Settings(**shape, **settings), 60, seed, table).area

    return play


STEPS = rates(24.0, 72.0, 216.0, 648.0, 1944.0)
BNPO_AREA = Claim(
    "bnpo",
    "advantages normalised by an adaptive Beta learn faster than with GRPO's deviation or without",
    "64 questions, one token of ten, success rates from Beta(2, 6), table, 60 updates of 64 x 16, SGD; step size from "
    "five",
    "mean reward of all updates",
    tuple(Arm(name, success_rates(m), STEPS) for name, m in (("BNPO", BNPO), ("GRPO", GRPO), ("RLOO", RLOO))),
    (("BNPO", "GRPO"), ("BNPO", "RLOO")),
)


def both_rewards(method: LLMMethod) -> Any:
    """The smaller of P(correct) and P(format) after 100 updates."""

    def play(seed: int, **settings: Any) -> float:
        weight = settings.pop("format_weight")
        task = gdpo.AnswerAndFormat() if weight == 1.0 else _Weighted(weight)
        found: list[float] = []
        config = method.Settings(
            n_prompts=gdpo.PROMPTS, group_size=4, optimiser="sgd", max_grad_norm=0.0, aggregate="sequence_mean",
            **settings,
        )  # fmt: skip

        def look(agent: LLM) -> None:
            p = agent.policy.logits.detach().softmax(-1)
            right = p[:, 0].gather(1, torch.arange(task.questions)[:, None] % gdpo.ARMS).mean()
            found.append(min(float(right), float(p[:, 1, 0].mean())))

        table = lambda task: TabularTokenPolicy(task.questions, 2, gdpo.ARMS, init=task.initial_logits())  # noqa: E731
        train(method, task, config, 100, seed, table, look)
        return found[-1]

    return play


class _Weighted(gdpo.AnswerAndFormat):
    """The format's reward times a factor: what a user of GRPO would tune first."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def score(self, *args: Any) -> Any:
        first = super().score(*args)
        factor = torch.tensor([1.0, self.weight])
        return first._replace(components=first.components * factor)


WEIGHTED = tuple(
    {"learning_rate": rate, "format_weight": weight}
    for rate in (8.0, 16.0, 24.0, 32.0, 48.0, 64.0) for weight in (1.0, 3.0, 6.0)
)  # fmt: skip
GDPO_BOTH = Claim(
    "gdpo",
    "normalising each reward by itself serves a reward of small scale that GRPO on the sum starves, even with weights",
    "answer of +-3 and format of 0 or 1, table, 100 updates of 16 x 4 completions, SGD; step size from six and the "
    "format's weight from three, which GDPO's normalisation takes out again",
    "the smaller of P(correct) and P(format) at the end",
    (Arm("GDPO", both_rewards(GDPO), WEIGHTED), Arm("GRPO", both_rewards(GRPO), WEIGHTED)),
    (("GDPO", "GRPO"),),
)  # fmt: skip


def two_scales(method: LLMMethod) -> Any:
    """How far both tasks are learnt, each between chance (0) and its best symbol (1); their mean."""

    def play(seed: int, **settings: Any) -> float:
        task = g2rpo.TwoScales(seed)
        config = method.Settings(n_prompts=8, group_size=8, max_grad_norm=0.0, optimiser="sgd", **settings)
        table = lambda task: TabularTokenPolicy(task.questions, 1, task.symbols)  # noqa: E731
        agent = train(method, task, config, 150, seed, table).agent
        p = agent.policy.logits.detach()[0, 0].softmax(-1)  # one prompt: all questions look like number 0
        odd = torch.arange(task.questions) % 2 == 1
        learnt: list[Tensor] = []
        for rows in (task.paid[~odd].mean(0), task.paid[odd].mean(0)):
            learnt.append((p @ rows - rows.mean()) / (rows.max() - rows.mean()))
        return float(torch.stack(learnt).mean())

    return play


G2RPO_TASKS = Claim(
    "g2rpo",
    "advantages of normal quantiles let one policy learn two tasks of different reward scales better than standardised "
    "or centred ones",
    "half of the questions pay 0 or 1, half log-normal rewards of about 0.01; one shared row of logits, 150 updates of "
    "8 x 8, SGD; step size from four",
    "mean over both tasks of the learnt share (0 chance, 1 best symbol)",
    tuple(Arm(name, two_scales(m), rates(2.0, 8.0, 32.0, 128.0))
          for name, m in (("G2RPO", G2RPO), ("GRPO", GRPO), ("Dr.GRPO", DrGRPO))),
    (("G2RPO", "GRPO"), ("G2RPO", "Dr.GRPO")),
)  # fmt: skip


class LongChain(TokenBandit):
    """Twenty decisions of six symbols; reward 1 if the four key ones are right."""

    name = "long_chain"
    keys = (3, 7, 12, 17)

    def __init__(self) -> None:
        super().__init__(1, 20, 6)

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return (tokens[list(self.keys)] == torch.tensor([2, 4, 1, 3]).unsqueeze(1)).all(0).float()


def chain(method: LLMMethod, **fixed: Any) -> Any:
    """Mean reward of all of 150 updates."""

    def play(seed: int, **settings: Any) -> float:
        shape = {"model": "tabular", "n_prompts": 64, "group_size": 16, "max_grad_norm": 0.0}
        table = lambda task: StateTable(1, 20, 1, 6, lambda state, token: torch.zeros_like(state))  # noqa: E731
        config = method.Settings(**shape, **fixed, **settings)
        return train(method, LongChain(), config, 150, seed, table).area

    return play


EMPG_AREA = Claim(
    "empg",
    "scaling each step's gradient by its uncertainty solves a long chain of decisions sooner than GRPO",
    "20 decisions of which 4 matter (first success 1 in 1,296), table, 150 updates of 64 x 16, Adam; rate from three",
    "mean reward of all updates",
    (
        Arm("EMPG", chain(EMPG, step="token"), rates(0.05, 0.1, 0.2)),
        Arm("GRPO", chain(GRPO), rates(0.05, 0.1, 0.2)),
    ),
    (("EMPG", "GRPO"),),
)


class HalfWrong(DeadPrompts):
    """Half of the demonstrations are of another question."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        wrong = torch.randperm(self.questions, generator=torch.Generator().manual_seed(seed))[: self.questions // 2]
        assert self.demonstrations is not None
        self.demonstrations = self.demonstrations.clone()
        self.demonstrations[wrong] = self.demonstrations[wrong.roll(1)]


def demonstrated(name: str) -> Any:
    """Mean probability of success over all questions after 400 steps."""

    def play(seed: int, **settings: Any) -> float:
        mode = dict(hpt.METHODS[name])
        if "warm_start_lr" in mode:
            mode["warm_start_lr"] = settings["learning_rate"]
        agent = HPT(HalfWrong(seed), HPT.Settings(**hpt.SHARED | mode | settings), seed=seed)
        agent.learn((hpt.STEPS - mode.get("warm_start_steps", 0)) * agent.samples_per_iteration)
        p = agent.policy.logits.detach().softmax(-1)
        return float((p * agent.task.allowed).sum(-1).prod(1).mean())

    return play


HPT_WRONG = Claim(
    "hpt",
    "imitating only where exploration fails is better than imitating always, in turn, or never, when half of the "
    "demonstrations are wrong",
    "256 questions, 40 % of them beyond exploration, table, 400 steps of 64 prompts, Adam; step size from three",
    "mean probability of success over all questions",
    tuple(Arm(name, demonstrated(name), rates(0.02, 0.05, 0.1))
          for name in ("HPT gate 0", "fixed mix 0.5/0.5", "SFT->GRPO", "LUFFY", "GRPO")),
    tuple(("HPT gate 0", other) for other in ("fixed mix 0.5/0.5", "SFT->GRPO", "LUFFY", "GRPO")),
)  # fmt: skip


def held_entropy(method: LLMMethod) -> Any:
    """Expected reward less the distance of the entropy from 1 nat per token, means of the last 20 of 150 updates."""

    def play(seed: int, **settings: Any) -> float:
        config = method.Settings(**modsum_shape(model="tabular", n_epochs=4, weight_decay=0.0, **settings))
        found: list[float] = []

        def look(agent: LLM) -> None:
            now = exact(agent.policy)
            found.append(now.reward - abs(now.entropy - 1.0))

        train(method, make_task("modsum"), config, 150, seed, partial_sums, look)
        return fmean(found[-20:])

    return play


DCPO_ENTROPY = Claim(
    "dcpo",
    "a REINFORCE term toward a hotter or colder policy holds a wanted entropy at less cost in reward than an entropy "
    "bonus",
    "ModSum, table, 150 updates of 16 x 8 completions, 4 epochs, Adam; six settings of each: step size, and target or "
    "weight of the bonus",
    "reward less the distance of the entropy from 1 nat per token, exactly computed, mean of the last 20 updates",
    (
        Arm("DCPO", held_entropy(DCPO), tuple(
            {"learning_rate": rate, "entropy_target": h} for rate in (0.05, 0.1) for h in (0.9, 1.0, 1.1))),
        Arm("GRPO, entropy bonus", held_entropy(GRPO), tuple(
            {"learning_rate": rate, "entropy_coef": b} for rate in (0.05, 0.1) for b in (0.005, 0.01, 0.02))),
    ),
    (("DCPO", "GRPO, entropy bonus"),),
)  # fmt: skip


# -- a shared perceptron ----------------------------------------------------------------------------------------------


def shared(method: LLMMethod, what: str, **fixed: Any) -> Any:
    """The gain in reward at a spending of ``d3s`` gradient tokens, or pass@8 after 150 updates."""
    spending = 18.0  # in tokens of whole rollouts: what D3S spends in 150 updates
    updates = int(spending) if what == "tokens" and method is not D3S else 150

    def play(seed: int, **settings: Any) -> float:
        task: Any = make_task("sum_rule")
        config = method.Settings(**d3s.SHAPE | fixed | settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            history = train(method, task, config, updates, seed, lambda t: d3s.SharedPolicy(256, 4, 16))
        if what == "tokens":
            spent = torch.tensor([row.get("train/token_share", 1.0) for row in history.stats]).cumsum(0)
            late = (spent > spending - 1.0) & (spent <= spending)  # the same share of both spendings
            return fmean(compress(history.reward, late.tolist())) - history.reward[0]
        agent = history.agent
        prompts = agent.collector.test_prompts(task.questions, 0)
        data = agent.collector.sample(agent.policy, prompts, torch.arange(len(prompts.index)).repeat_interleave(8),
                                      tag="pass")  # fmt: skip
        return float((data["episode_reward"].view(-1, 8) >= 1.0).any(1).float().mean())

    return play


D3S_TOKENS = Claim(
    "d3s",
    "choosing what to learn from gains more reward per gradient token than learning from all",
    "sum_rule, shared perceptron, spending of 18 rollouts' tokens (D3S: all of 150 updates of 32 x 16), AdamW; step "
    "size from four",
    "reward gained at that spending, the mean of the updates that spend its last rollout's tokens",
    tuple(Arm(name, shared(m, "tokens"), rates(0.01, 0.03, 0.1, 0.3)) for name, m in (("D3S", D3S), ("GRPO", GRPO))),
    (("D3S", "GRPO"),),
)
RISKPO_PASS = Claim(
    "riskpo",
    "the mixed value at risk finds right answers to more questions (pass@8) than GRPO's mean",
    "sum_rule, shared perceptron, 150 updates of 40 x 8, AdamW; step size from four",
    "share of questions with a right answer among 8 samples",
    tuple(Arm(name, shared(m, "pass", n_prompts=40, group_size=8), rates(0.0003, 0.001, 0.003, 0.01))
          for name, m in (("RiskPO", RiskPO), ("GRPO", GRPO))),
    (("RiskPO", "GRPO"),),
)  # fmt: skip


def offline(method: str) -> Any:
    """Regularised return of the best epoch: the rivals get the same favour."""

    def play(seed: int, **settings: Any) -> float:
        return max(copg.offline(method, seed, **settings))

    return play


COPG_OFFLINE = Claim(
    "copg",
    "from data of another policy, CoPG reaches a higher regularised return than DPO, IPO and importance weights",
    "sequences of 6 tokens of 8, 512 completions of a worse policy, perceptron, 60 epochs, AdamW; step size from five",
    "regularised return of the best epoch",
    tuple(Arm(name, offline(name), rates(3e-4, 1e-3, 3e-3, 1e-2, 3e-2)) for name in ("CoPG", "DPO", "IPO", "IW-PG")),
    tuple(("CoPG", other) for other in ("DPO", "IPO", "IW-PG")),
)

CLAIMS = (
    GBPO_EPOCHS, REAL_AREA, MHPO_AREA, BNPO_AREA, GDPO_BOTH, G2RPO_TASKS, EMPG_AREA, HPT_WRONG, D3S_TOKENS, RISKPO_PASS,
    COPG_OFFLINE, DCPO_ENTROPY,
)  # fmt: skip
