"""RPO: regularised preference optimisation. Liu et al. 2024, "Provably Mitigating Overoptimization in RLHF: Your SFT
Loss is Implicitly an Adversarial Regularizer", arXiv 2405.16436.

A policy that is best against the worst reward that still explains the preferences, with ``pi_base`` as the baseline,

    max_pi min_r  eta ( E_x[E_pi r(x, a) - E_base r(x, a)] - beta KL(pi || ref) ) + L_D(r),
    L_D = -E log sigmoid(r(y_w) - r(y_l)),

has the reward ``r = beta log(pi / ref) + beta log Z``. What is left is DPO with maximum likelihood of the baseline's
answers, for which the preferred ones are taken:

    D = (log pi(w) - log ref(w)) - (log pi(l) - log ref(l))                    sums over tokens
    L = -log sigmoid(beta D) - eta beta log pi(w)                              nll="sum"
    L = -log sigmoid(beta D) - eta log pi(w) / length(w)                       nll="mean", the paper's appendix
    with label smoothing e the first part is -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)

Slots: data = pairs of a group; ratio = pair, to the reference; loss = DPO + eta beta NLL of the preferred one. Pairs
are made online (``agents.llm.preferences``); ties and empty completions make none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.llm.agent import LLMMethod
from agents.llm.preferences import PreferenceConfig, PreferenceRecipe, dpo, per_pair
from ccrl.data import Data, masked
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Ratio, Term
from ccrl.settings import Nonnegative, Positive, Range

__all__ = ["RPO", "RPOConfig", "RPORecipe", "member", "smoothed_dpo"]

NOTHING = 1e-6
"""The released code reads a smaller eta as 0."""


@dataclass(frozen=True)
class RPOConfig(PreferenceConfig):
    """The released runs of Mistral-7B; beta 0.05 for Gemma, and nll mean with beta 0.5 and eta 0.2. Log-likelihoods of
    chats are around -300: on short completions eta wants to be 0.05 to 1."""

    beta: Positive = 0.01
    """The implied KL penalty has this weight: the inverse strength of a preference."""
    eta: Nonnegative = 0.005
    """The likelihood of the preferred completion is added with this weight; less than 1e-6 is DPO."""
    nll: Literal["sum", "mean"] = "sum"
    """That likelihood is the sum over tokens times beta (sum), or the mean over tokens (mean)."""
    label_smoothing: Annotated[float, Range(0.0, 0.5)] = 0.0
    """This share of the preferences is taken to be the wrong way round."""

    @property
    def nll_coef(self) -> float:
        """Weight of the likelihood in the loss."""
        if self.eta < NOTHING:
            return 0.0
        return self.eta * self.beta if self.nll == "sum" else self.eta


def smoothed_dpo(beta: float, smoothing: float) -> Loss:
    """``-(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)``."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        x = beta * ratio.log_ratio
        return -(1.0 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)

    return loss


def member(sign: float, mean: bool = False) -> Ratio:
    """Log-probabilities of a pair's preferred (``sign`` 1) or rejected (-1) member and of the reference, summed over
    tokens or averaged, on the column of the preferred one ``[1, B]``; not valid elsewhere."""

    def ratio(outputs: Outputs, batch: Data) -> LogRatio:
        valid, group = batch["valid"], batch["group"]
        found = batch["preferred"].to(valid.dtype) * (valid > 0).any(0)
        partners = (group.unsqueeze(0) == group.unsqueeze(1)).to(valid.dtype)
        count = valid.sum(0).clamp_min(1.0) if mean else torch.ones_like(found)

        def of(log_prob: Tensor) -> Tensor:
            total = masked(log_prob, valid).sum(0) / count
            return (torch.where(found == sign, total, 0.0) @ partners).unsqueeze(0)

        whole = (found > 0) & ((found < 0).to(valid.dtype) @ partners > 0)
        return LogRatio(of(outputs["log_prob"]), of(batch["ref_log_prob"]), whole.to(valid.dtype).unsqueeze(0))

    return ratio


def _nll(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    return -ratio.log_prob


class RPORecipe(PreferenceRecipe):
    """Two terms on the same pairs, from one forward pass."""

    config: RPOConfig

    def loss(self) -> Loss:
        c = self.config
        return smoothed_dpo(c.beta, c.label_smoothing) if c.label_smoothing else dpo(c.beta)

    def terms(self) -> tuple[Term, ...]:
        c = self.config
        preference, *penalties = super().terms()
        # of no weight it is there for the log: whether the likelihood of what is preferred collapses
        chosen = Term(
            "chosen_nll", _nll, per_pair, member(1.0, c.nll == "mean"), advantage=None, coef=c.nll_coef,
            stats=self._watched,
        )  # fmt: skip
        return (preference, chosen, *penalties)

    def _watched(self, ratio: Any, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
        chosen, rejected = (member(sign)(outputs, batch) for sign in (1.0, -1.0))
        return {
            "chosen_log_prob": chosen.log_prob, "rejected_log_prob": rejected.log_prob,
            "chosen_reward": self.config.beta * chosen.log_ratio,
            "rejected_reward": self.config.beta * rejected.log_ratio,
        }  # fmt: skip


RPO = LLMMethod(
    "rpo",
    "Liu et al. 2024, arXiv 2405.16436",
    RPOConfig,
    RPORecipe,
    {
        "data": "pairs of a group",
        "ratio": "pair, to the reference",
        "loss": "-log sigmoid + eta beta NLL of the preferred one",
        "aggregate": "pairs",
    },
)
"""Regularised Preference Optimization (Liu et al. 2024): DPO with the likelihood of the preferred completion."""
