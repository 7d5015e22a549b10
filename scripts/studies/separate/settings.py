"""The settings: what can make methods differ, and who is compared there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.llm.adora import ADORA
from agents.llm.agent import LLMMethod
from agents.llm.baselines import CISPO, DAPO, GRPO, GSPO
from agents.llm.bnpo import BNPO
from agents.llm.capo import CAPO
from agents.llm.copo import COPO
from agents.llm.d3s import D3S
from agents.llm.dcpo import DCPO
from agents.llm.empg import EMPG
from agents.llm.epo import EPO
from agents.llm.etr import ETR
from agents.llm.g2rpo import G2RPO
from agents.llm.gbpo import GBPO
from agents.llm.gdpo import GDPO
from agents.llm.hpt import HPT
from agents.llm.knapsack_rl import KnapsackRL
from agents.llm.mhpo import MHPO
from agents.llm.mmr1_vas import MMR1
from agents.llm.p3o import P3O
from agents.llm.pf_ppo import PFPPO
from agents.llm.r2vpo import R2VPO
from agents.llm.real import REAL
from agents.llm.riskpo import RiskPO
from agents.llm.rpo import RPO
from ccrl.estimators.base import Stage
from ccrl.estimators.divergences import ChiSquarePenalty
from ccrl.estimators.recipe import MethodConfig, Recipe
from ccrl.estimators.stages import GroupBaseline
from ccrl.settings import Nonnegative
from scripts.studies.separate.setting import Entry, Judge, Setting, Start

__all__ = ["SETTINGS"]

SORTING = Start("sorting", {"digits": 5}, steps=130)
PAIRS = {"group_size": 2, "n_prompts": 64}
"""P3O compares two completions of a prompt; as many completions as 16 x 8."""


@dataclass(frozen=True)
class ChiSquareConfig(MethodConfig):
    """GRPO whose reward pays for leaving the reference."""

    coef: Nonnegative = 0.1
    """Weight of the square root of chi-square of whole completions (docs/orpo.md)."""


class ChiSquareRecipe(Recipe):
    """The penalty, then GRPO's advantages."""

    wants_reference = True

    def stages(self) -> tuple[Stage, ...]:
        advantage = GroupBaseline("shaped_episode_reward", scale="std", single="zero")
        return ChiSquarePenalty(self.config.coef), advantage


OCCUPANCY = LLMMethod(
    "grpo_chi_square", "Laidlaw et al. 2025, arXiv 2403.03185", ChiSquareConfig, ChiSquareRecipe,
    {"reward": "minus the root of chi-square to the reference"},
)  # fmt: skip


def with_rates(name: str, *values: float, rates: tuple[float, float] = (1e-4, 3e-4)) -> tuple[dict[str, Any], ...]:
    """A grid of one more setting and the step sizes that most methods choose; as many as the setting's own grid."""
    return tuple({name: value, "learning_rate": rate} for value in values for rate in rates)


STALE = Setting(
    "stale",
    "every rollout is used for four epochs of four minibatches, so ratios leave 1",
    SORTING,
    {"n_prompts": 16, "group_size": 8, "n_epochs": 4, "batch_size": 32, "max_grad_norm": 1.0},
    60 * 128,
    {
        "GRPO": Entry(GRPO), "MHPO": Entry(MHPO), "GBPO": Entry(GBPO), "R2VPO": Entry(R2VPO), "CAPO": Entry(CAPO),
        "ETR": Entry(ETR), "REAL": Entry(REAL), "P3O": Entry(P3O, PAIRS), "CISPO": Entry(CISPO), "GSPO": Entry(GSPO),
    },
)  # fmt: skip
SPARSE = Setting(
    "sparse",
    "few prompts are solved at the start, so most groups teach nothing",
    Start("sorting", {"digits": 5}, steps=80),
    {"n_prompts": 16, "group_size": 8},
    300 * 128,
    {
        "GRPO": Entry(GRPO), "HPT": Entry(HPT), "COPO": Entry(COPO),
        # a right answer is as long as may be here: the penalty would teach to leave it out
        "DAPO without length penalty": Entry(DAPO, {"overlong_share": 0.0}),
        "Knapsack RL": Entry(KnapsackRL, {"batch_size": 0}),
        "MMR1": Entry(MMR1, {"pool_size": 64, "probe_rollouts": 8, "refresh_every": 25, "kl_coef": 0.0}),
        "D3S": Entry(D3S), "ADORA": Entry(ADORA, {"kl_coef": 0.0}),
    },
)  # fmt: skip
REWARDS = Setting(
    "rewards",
    "two rewards of unequal difficulty: the form is learnt long before the number",
    Start("format_accuracy", {"digits": 1, "modulus": 10}, steps=100),
    {"n_prompts": 16, "group_size": 8},
    300 * 128,
    {"GRPO": Entry(GRPO), "GDPO": Entry(GDPO), "BNPO": Entry(BNPO), "G2RPO": Entry(G2RPO)},
    remark="No method learns the number here, so that the table says little of the methods: [claims](../claims.md) has "
    "GDPO, BNPO and G2RPO on tasks that are learnt.",
)
TURNS = Setting(
    "turns",
    "conversations of up to five turns with one reward at their end",
    Start("guessing", {}, steps=80),
    {"n_prompts": 16, "group_size": 8},
    80 * 128,
    {"GRPO": Entry(GRPO), "EMPG": Entry(EMPG, {"step": "turn"}), "EPO": Entry(EPO)},
)
COUNTDOWN = Start("countdown", {"numbers": 3}, steps=300)
ENTROPY = Setting(
    "entropy",
    "a long run on questions with several answers, in which the entropy falls; the score is pass@8",
    COUNTDOWN,
    {"n_prompts": 16, "group_size": 8},
    200 * 128,
    {
        "GRPO": Entry(GRPO),
        "GRPO with an entropy bonus": Entry(GRPO, {}, with_rates("entropy_coef", 0.003, 0.01, 0.03)),
        "DCPO": Entry(DCPO), "RiskPO": Entry(RiskPO), "EPO": Entry(EPO),
        "precision, then GRPO": Entry(GRPO, start=Start("countdown", {"numbers": 3}, 300, beta=-0.25)),
        "diversity, then GRPO": Entry(GRPO, start=Start("countdown", {"numbers": 3}, 300, beta=0.5)),
    },
    score="pass8",
)  # fmt: skip
SMALL = (1e-5, 1e-4)  # the smallest is what all others choose here
PROXY = Setting(
    "proxy",
    "a reward model from few preferences is paid; the score is the verifier's",
    SORTING,
    {"n_prompts": 16, "group_size": 8},
    100 * 128,
    {
        "GRPO": Entry(GRPO),
        "GRPO, token KL": Entry(GRPO, {}, with_rates("kl_coef", 0.01, 0.1, 1.0, rates=SMALL)),
        "GRPO, sequence chi-square": Entry(OCCUPANCY, {}, with_rates("coef", 0.03, 0.1, 0.3, rates=SMALL)),
        "PF-PPO": Entry(PFPPO), "RPO": Entry(RPO), "P3O": Entry(P3O, PAIRS),
    },
    judge=Judge(prompts=64, steps=300),
)  # fmt: skip

SETTINGS = {setting.name: setting for setting in (STALE, SPARSE, REWARDS, TURNS, ENTROPY, PROXY)}
