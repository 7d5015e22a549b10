"""CAPO: Curvature-Aware Policy Optimization (Melo et al. 2026, "Stabilizing Policy Gradients for Sample-Efficient
Reinforcement Learning in LLM Reasoning", ICLR, arXiv 2510.00819).

Before an update every token's effect is predicted by a second-order model of the last layer ``logits = W h``, and the
few tokens whose prediction is out of bounds are left out of the loss. With ``pi`` over the ``k`` most probable tokens
and the sampled one ``a``, ``v = e_a - pi``, the token's gradient ``g = A v h^T``, a step ``lr D``, ``u = D h``:

    m_H  = lr <g, D> + lr^2 A ((v.u)^2 - u^T F u) / 2,   F = diag(pi) - pi pi^T     change of A pi'(a) / pi(a) - A
    m_F  = lr^2 (v.u)^2 / 2                                                           one sample of KL(pi || pi')
    keep = -tau_H < m_H < tau_H  and  m_F < tau_F
    D    = g                                                                          sgd
    D    = ((b1 m + (1 - b1) g) / (1 - b1^(t+1))) / (sqrt((b2 q + (1 - b2) g^2) / (1 - b2^(t+1))) + eps)     adam

``m``, ``q`` are moments of ``g`` per row of ``W``, moved once per iteration by the mean over the kept tokens that touch
the row. Everything else is GRPO. Slot: data = which tokens. Needs a policy with hidden states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.estimators.recipe import Aggregation, MethodConfig, Parts, Recipe
from ccrl.settings import Natural, Positive, Range
from ccrl.updaters import Stats

__all__ = ["CAPO", "CAPOConfig", "CAPORecipe", "Moments", "Prediction", "Tokens", "acceptable", "predict"]

Threshold = Annotated[float, Range(0.0, above=True, also=(math.inf,))]
B1, B2, EPS = 0.9, 0.999, 1e-8
TABLE = 2**22
"""Numbers of a gradient ``[M, k, H]`` that are made at once."""
WANT = frozenset({"hidden", "topk_index", "topk_log_prob"})


@dataclass(frozen=True)
class CAPOConfig(MethodConfig):
    """The released thresholds for GRPO's loss; Dr. GRPO's (aggregate fixed) has 1e-3 and 5e-4. They scale with the
    squared step size and with hidden states: take them anew for another model (docs/llm/capo.md)."""

    aggregate: Aggregation = "sequence_mean_token_mean"
    curvature: Literal["adam", "sgd"] = "adam"
    """The step is modelled as Adam's, with moments of the last layer, or as plain gradient ascent (sgd)."""
    fisher_threshold: Threshold = 1e-4
    """tau_F: tokens are left out that are predicted to move the policy by this KL or more; inf leaves none out."""
    objective_threshold: Threshold = 0.01
    """tau_H: tokens are left out that are predicted to change the objective by this much or more; inf leaves none
    out."""
    symmetric: bool = True
    """The change of the objective may be negative too, down to minus the threshold (released); if false it has to be at
    least 0."""
    warm_up_iterations: Natural = 1
    """So many iterations leave out no token: without moments Adam's step is taken for the gradient itself, and where
    that leaves out every token there never are any."""
    modelled_step: Positive | None = None
    """The modelled step has this size; none takes the optimiser's."""


# -- the model --------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """``M`` tokens as the last layer sees them."""

    hidden: Tensor
    """``[M, H]``."""
    rows: Tensor
    """``[M, k]`` int64: of the last layer."""
    pi: Tensor
    """``[M, k]``: the policy restricted to these rows."""
    error: Tensor
    """``[M, k]``: ``v``, one at the sampled token minus ``pi``."""
    advantage: Tensor
    """``[M]``."""

    @classmethod
    def of(
        cls, hidden: Tensor, index: Tensor, log_prob: Tensor, action: Tensor, chosen: Tensor, advantage: Tensor
    ) -> Tokens:
        """From the most probable tokens ``index`` ``[M, k]`` with ``log_prob``, and the sampled ones ``action`` ``[M]``
        with ``chosen``: one that is not among the former takes the place of the last of them."""
        outside = ~(index == action.unsqueeze(1)).any(1)
        index, log_prob = index.clone(), log_prob.clone()
        index[:, -1] = torch.where(outside, action, index[:, -1])
        log_prob[:, -1] = torch.where(outside, chosen, log_prob[:, -1])
        pi = log_prob.softmax(1)
        return cls(hidden, index, pi, (index == action.unsqueeze(1)).to(pi.dtype) - pi, advantage)

    def split(self, size: int) -> list[Tokens]:
        """Pieces of at most ``size`` tokens."""
        return [Tokens(*piece) for piece in zip(*(torch.split(x, size) for x in self), strict=True)]

    @property
    def gradient(self) -> Tensor:
        """``g`` ``[M, k, H]``."""
        return (self.advantage.unsqueeze(1) * self.error).unsqueeze(2) * self.hidden.unsqueeze(1)


class Prediction(NamedTuple):
    """What a step is predicted to do, ``[M]`` each."""

    objective: Tensor
    """``m_H``: change of the token's ``A pi'(a) / pi(a)``."""
    fisher: Tensor
    """``m_F``: one sample of the KL from the policy to the next one."""


class Moments(nn.Module):
    """Adam's moments of the rows of the last layer, as many as tokens were met: they are no buffers of fixed shape, and
    the checkpoint holds them as the module's extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.steps = torch.zeros(0, 0), torch.zeros(0, 0), 0

    def step(self, tokens: Tokens) -> Tensor:
        """``D`` ``[M, k, H]``: what Adam would make of each token's gradient alone; the gradient itself at first."""
        g = tokens.gradient
        if not self.steps:
            return g
        self._fit(int(tokens.rows.max()) + 1, tokens.hidden)
        t = self.steps + 1
        m, q = (x[tokens.rows] for x in (self.first, self.second))
        first, second = B1 * m + (1.0 - B1) * g, B2 * q + (1.0 - B2) * g.square()
        return first / (1.0 - B1**t) / ((second / (1.0 - B2**t)).sqrt() + EPS)

    def move(self, total: Tensor, count: Tensor) -> None:
        """One step with the sums ``[V, H]`` of the kept gradients of every row and their number ``[V]``; rows that
        nothing touched stay."""
        touched = (count > 0).nonzero().squeeze(-1)
        mean = total[touched] / count[touched].unsqueeze(1)
        self._fit(len(total), total)
        self.steps += 1
        self.first[touched] = B1 * self.first[touched] + (1.0 - B1) * mean
        self.second[touched] = B2 * self.second[touched] + (1.0 - B2) * mean.square()

    def _fit(self, rows: int, like: Tensor) -> None:
        """At least ``rows`` rows, new ones 0, of the kind of ``like`` ``[..., H]``."""
        for name in ("first", "second"):
            old: Tensor = getattr(self, name)
            if len(old) < rows or old.device != like.device or old.dtype != like.dtype:
                new = like.new_zeros(max(rows, len(old)), like.shape[-1])
                if old.numel():
                    new[: len(old)] = old.to(new)
                setattr(self, name, new)

    def get_extra_state(self) -> dict[str, Any]:
        return {"first": self.first.clone(), "second": self.second.clone(), "steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.first, self.second, self.steps = state["first"].clone(), state["second"].clone(), state["steps"]


def predict(tokens: Tokens, lr: float, moments: Moments | None = None) -> Prediction:
    """The effect of a step of size ``lr``, of gradient ascent or (with ``moments``) of Adam's."""
    if moments is None or not moments.steps:
        # D = g in closed form: no [M, k, H]
        size = tokens.hidden.square().sum(1)
        u = (tokens.advantage * size).unsqueeze(1) * tokens.error
        slope = tokens.advantage.square() * tokens.error.square().sum(1) * size
    else:
        step = moments.step(tokens)
        u = (step @ tokens.hidden.unsqueeze(2)).squeeze(2)
        slope = (tokens.gradient * step).sum((1, 2))
    along = (tokens.error * u).sum(1)
    spread = (tokens.pi * u.square()).sum(1) - (tokens.pi * u).sum(1).square()
    fisher = 0.5 * lr**2 * along.square()
    return Prediction(lr * slope + 0.5 * lr**2 * tokens.advantage * (along.square() - spread), fisher)


def acceptable(
    prediction: Prediction, fisher_threshold: float, objective_threshold: float, symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """``[M]`` bool each: the KL is below its threshold; the change of the objective is within its own."""
    change = prediction.objective
    low = change > -objective_threshold if symmetric else change >= 0.0
    return prediction.fisher < fisher_threshold, low & (change < objective_threshold)


# -- recipe -----------------------------------------------------------------------------------------------------------


class CAPORecipe(Recipe):
    """GRPO on tokens whose step is predicted to stay within bounds."""

    config: CAPOConfig

    def __init__(self, config: Any, parts: Parts) -> None:
        outputs: Any = getattr(parts.policy, "outputs", None)
        missing = sorted(WANT - outputs()) if outputs is not None else []
        if missing:
            raise ValueError(f"capo reads {missing} of the policy, which computes {sorted(outputs())}: take a language "
                             "model with hidden states")  # fmt: skip
        super().__init__(config, parts)
        self.moments = Moments()
        self._found: tuple[Stats, Tensor, Tensor] | None = None

    def step_size(self, warm: bool) -> float:
        """Of the modelled step. :raises ValueError: nobody says it, and the warm-up is over."""
        if self.config.modelled_step is not None:
            return self.config.modelled_step
        if self.parts.updater is None and warm:
            return 0.0
        if self.parts.updater is None:
            raise ValueError("modelled_step: expected a number where there is no optimiser, got None")
        return float(self.parts.updater.lr)

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        """``on`` with ``valid`` 0 on tokens that are left out; they stay in the context, and count nowhere."""
        found = super().prepare(have, ctx)
        data, c = found["on"], self.config
        inside = data["valid"] > 0
        adam, warm = c.curvature == "adam", int(ctx.k) < c.warm_up_iterations
        predictions, good, totals = list[Prediction](), list[Tensor](), list[tuple[Tensor, Tensor]]()
        shown = list[Tensor]()
        for piece in data.microbatches(c.microbatch or None):
            tokens = self.tokens(piece)
            lr = self.step_size(warm)
            room = max(1, TABLE // max(1, tokens.rows.shape[1] * tokens.hidden.shape[1])) if adam else len(tokens.pi)
            verdicts = [torch.zeros(0, dtype=torch.bool, device=inside.device)]
            for part in tokens.split(max(1, room)):
                predictions.append(predict(part, lr, self.moments if adam else None))
                fine = torch.stack(
                    acceptable(predictions[-1], c.fisher_threshold, c.objective_threshold, c.symmetric)
                )  # fmt: skip
                if warm:
                    fine = torch.ones_like(fine)
                good.append(fine)
                verdicts.append(fine.all(0))
                if adam:
                    totals.append(_sums(part, fine.all(0)))
            mask = piece["valid"].t()
            shown.append(torch.zeros_like(mask).masked_scatter(mask > 0, torch.cat(verdicts).to(mask.dtype)))
        kept = torch.cat(shown).t().contiguous()  # as it was: sums over another layout round differently
        self._found = (_summary(predictions, good), *_added(totals))
        return found | {"on": data.with_raw(valid=kept)}

    def tokens(self, data: Data) -> Tokens:
        """The valid tokens, by sequence and in it by time; hidden states are what the last layer multiplies, over the
        temperature."""
        out = self.parts.policy(data, WANT)
        rows = (data["valid"] > 0).t()

        def flat(x: Tensor) -> Tensor:
            return x.transpose(0, 1)[rows]

        temperature: Any = self.parts.policy.temperature
        hidden = flat(out["hidden"]) / temperature
        return Tokens.of(
            hidden, flat(out["topk_index"]), flat(out["topk_log_prob"]), flat(data["action"]), flat(data["log_prob"]),
            flat(data["advantage"]),
        )  # fmt: skip

    def idle(self, data: Data, ctx: Context) -> bool:
        return not bool((data["valid"] > 0).any())

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """The moments move. Shares of the tokens that each threshold left out; mean predictions before and after."""
        assert self._found is not None
        found, total, count = self._found
        stats |= found
        if bool((count > 0).any()):
            self.moments.move(total, count)
        self._found = None


def _sums(tokens: Tokens, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Sum ``[V, H]`` and number ``[V]`` of the kept gradients of every row."""
    width, rows = tokens.hidden.shape[1], int(tokens.rows.max()) + 1 if tokens.rows.numel() else 0
    index = tokens.rows[kept].flatten()
    total = tokens.hidden.new_zeros(rows, width).index_add(0, index, tokens.gradient[kept].flatten(0, 1))
    return total, tokens.hidden.new_zeros(rows).index_add(0, index, torch.ones_like(tokens.pi[kept].flatten()))


def _added(totals: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if not totals:
        return torch.zeros(0, 0), torch.zeros(0)
    rows = max(len(count) for _, count in totals)
    total, count = (x.new_zeros(rows, *x.shape[1:]) for x in totals[0])
    for more, number in totals:
        total[: len(more)] += more
        count[: len(number)] += number
    return total, count


def _summary(predictions: list[Prediction], good: list[Tensor]) -> Stats:
    objective, fisher = (torch.cat([p[i] for p in predictions]) for i in (0, 1))
    fine = torch.cat(good, 1)
    kept = fine.all(0)
    count = max(1, len(kept))
    left = kept.sum().clamp_min(1)
    return {
        "rejected_share": (~kept).sum() / count, "rejected_by_fisher": (~fine[0]).sum() / count,
        "rejected_by_objective": (~fine[1]).sum() / count,
        "predicted_change": objective.sum() / count, "predicted_change_kept": objective[kept].sum() / left,
        "predicted_kl": fisher.sum() / count, "predicted_kl_kept": fisher[kept].sum() / left,
    }  # fmt: skip


CAPO = LLMMethod(
    "capo",
    "Melo et al. 2026, arXiv 2510.00819",
    CAPOConfig,
    CAPORecipe,
    {
        "advantage": "group z-score",
        "data": "tokens whose predicted change of objective and policy is within bounds",
        "ratio": "token",
        "loss": "clip",
        "aggregate": "means over kept tokens, sequence means",
    },
)
"""Curvature-Aware Policy Optimization (Melo et al. 2026): tokens are left out before they do harm."""
