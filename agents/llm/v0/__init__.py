"""V0: the success rate of any policy on a new prompt, from outcomes of that policy in context. Zhang et al. 2026,
"V_0: A Generalist Value Model for Any Policy at State Zero", arXiv 2602.03584.

A policy is what it has done: ``C = {(x_j, r_j)}``. Of the token states ``h`` of a prompt, made by a frozen embedding,

    Q = Q_static + G(mean h),  z = flatten(MHA(LN(Q), LN(kv), kv)),  kv = W h         adapter; G ends in zeros
    s(x, C) = head(z(x); {(z(x_j), 1[r_j >= 0.5])}),    V0(x, C) = sigmoid(s)         head, in context
    L = alpha L_rank + (1 - alpha) L_CE,    L_rank = -mean log sigmoid(s(x+, C) - s(x-, C)) within one context

An offset b(C) of all scores is in no rank loss: it makes the model look at prompts and not at the context's mean alone.
With p_i = V0(x_i, C) of the current policy a GRPO iteration divides its completions, and a router chooses a policy:

    max sum_i B_i (1 - p_i) [1 - (1 - p_i)^(B_i - 1)],  sum B_i = total,  low <= B_i <= high
    argmax_pi V0(x, C_pi^beta),    r^beta = beta r + (1 - beta) (1 - cost)

The paper's head is a pretrained tabular model (TabPFN); ``ContextHead``, a small set transformer trained with the
adapter, stands in for it, and ``ContextLogistic`` needs no training. Slot: plan = counts per prompt.
"""

from agents.llm.v0.budget import V0, V0Config, V0Recipe, divide, route, utility
from agents.llm.v0.outcomes import OutcomeLog, intra_auc, outcome_pairs, residuals
from agents.llm.v0.value import (
    Adapter,
    ContextHead,
    ContextLogistic,
    TokenStates,
    ValueModel,
    loss_terms,
    rank_loss,
    soft_cross_entropy,
)

__all__ = [
    "V0", "Adapter", "ContextHead", "ContextLogistic", "OutcomeLog", "TokenStates", "V0Config", "V0Recipe",
    "ValueModel", "divide", "intra_auc", "loss_terms", "outcome_pairs", "rank_loss", "residuals", "route",
    "soft_cross_entropy", "utility",
]  # fmt: skip
