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

``m``, ``q`` are moments of ``g`` per row of ``W``, moved at every optimiser step by the mean over the kept tokens that
touch the row. Everything else is GRPO. Slot: data = which tokens. Needs a policy with hidden states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators import ratios
from ccrl.estimators.base import Context
from ccrl.estimators.recipe import Aggregation, MethodConfig, Parts, Recipe
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.settings import Natural, Positive, Range
from ccrl.updaters import Stats

__all__ = ["CAPO", "CAPOConfig", "CAPORecipe", "Moments", "Prediction", "Tokens", "acceptable", "predict"]

Threshold = Annotated[float, Range(0.0, above=True, also=(math.inf,))]
B1, B2, EPS = 0.9, 0.999, 1e-8
TABLE = 2**22
"""Numbers of a gradient ``[M, k, H]`` that are made at once."""
WANT = frozenset({"log_prob", "hidden", "topk_index", "topk_log_prob"})


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
        first, second = (x[tokens.rows] for x in (self.first, self.second))
        # in place: [M, k, H] is large
        first.mul_(B1).add_(g, alpha=1.0 - B1).div_(1.0 - B1**t)
        second.mul_(B2).addcmul_(g, g, value=1.0 - B2).div_(1.0 - B2**t).sqrt_().add_(EPS)
        return first.div_(second)

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
        u = (tokens.advantage * tokens.hidden.square().sum(1)).unsqueeze(1) * tokens.error
    else:
        u = (moments.step(tokens) @ tokens.hidden.unsqueeze(2)).squeeze(2)
    along = (tokens.error * u).sum(1)
    slope = tokens.advantage * along  # <g, D>, as g = A v h^T
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
    """GRPO on tokens whose step is predicted to stay within bounds, from the forward pass of the update itself."""

    config: CAPOConfig

    def __init__(self, config: Any, parts: Parts) -> None:
        outputs: Any = getattr(parts.policy, "outputs", None)
        missing = sorted(WANT - outputs()) if outputs is not None else []
        if missing:
            raise ValueError(f"capo reads {missing} of the policy, which computes {sorted(outputs())}: take a language "
                             "model with hidden states")  # fmt: skip
        super().__init__(config, parts)
        self.moments = Moments()
        self._warm = True
        self._pieces: dict[int, _Piece] = {}
        """Of the minibatch at hand, by the first column of each piece: what is looked at twice counts once."""
        self._stats: list[Tensor] = []

    def step_size(self) -> float:
        """Of the modelled step. :raises ValueError: nobody says it, and the warm-up is over."""
        if self.config.modelled_step is not None:
            return self.config.modelled_step
        if self.parts.updater is not None:
            return float(self.parts.updater.lr)
        if self._warm:
            return 0.0
        raise ValueError("modelled_step: expected a number where there is no optimiser, got None")

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        found = super().prepare(have, ctx)
        self._warm = int(ctx.k) < self.config.warm_up_iterations
        self._pieces, self._stats = {}, []
        on = found["on"]
        return found | {"on": on.derive_sequence(place=torch.arange(on.shape[1], device=on["valid"].device))}

    def terms(self) -> tuple[Term, ...]:
        """No statistics of the ratio: they would take one more forward pass per iteration."""
        return (replace(self.policy_term(self.loss(), self.kept, want=WANT), stats=None), *self.penalties())

    def kept(self, evaluation: Outputs, batch: Data) -> LogRatio:
        """The token's ratio, ``valid`` 0 on tokens that are left out: no mean of a sequence's tokens counts them."""
        level = ratios.token(evaluation, batch)
        with torch.no_grad():
            keep = self._judge({name: evaluation[name].detach() for name in WANT}, batch)
        return level._replace(valid=level.valid * keep)

    def _judge(self, out: Outputs, batch: Data) -> Tensor:
        """``[T', B]``: 1 where kept."""
        c, adam = self.config, self.config.curvature == "adam"
        valid, first = batch["valid"], int(batch["place"][0])
        inside = valid > 0
        temperature: Any = self.parts.policy.temperature
        tokens = Tokens.of(
            (out["hidden"][inside] / temperature).to(out["log_prob"].dtype),  # sums of bfloat16 lose most of its digits
            out["topk_index"][inside], out["topk_log_prob"][inside], batch["action"][inside], out["log_prob"][inside],
            batch["advantage"][inside],
        )  # fmt: skip
        if not len(tokens.pi):
            return torch.ones_like(valid)
        size = max(1, TABLE // (tokens.rows.shape[1] * tokens.hidden.shape[1])) if adam else len(tokens.pi)
        lr, piece = self.step_size(), _Piece()
        for part in tokens.split(size):
            found = predict(part, lr, self.moments if adam else None)
            good = torch.stack(acceptable(found, c.fisher_threshold, c.objective_threshold, c.symmetric))
            piece.add(part, found, torch.ones_like(good) if self._warm else good, adam)
        self._pieces[first] = piece
        return torch.zeros_like(valid).masked_scatter(inside, torch.cat(piece.kept).to(valid.dtype))

    def after_minibatch(self, stats: Stats, ctx: Context) -> None:
        """The moments move by the kept tokens of the step."""
        pieces, self._pieces = list(self._pieces.values()), {}
        self._stats += [piece.stats for piece in pieces if piece.stats is not None]
        sums = [found for piece in pieces for found in piece.sums]
        if sums:
            rows = max(len(count) for _, count in sums)
            total, count = (x.new_zeros(rows, *x.shape[1:]) for x in sums[0])
            for more, number in sums:
                total[: len(more)] += more
                count[: len(number)] += number
            if bool((count > 0).any()):
                self.moments.move(total, count)

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """Shares of the tokens that each threshold left out; mean predictions of all tokens and of those kept."""
        if not self._stats:
            return
        count, left, *sums = torch.stack(self._stats).sum(0)
        names = ("rejected_share", "rejected_by_fisher", "rejected_by_objective", "predicted_change", "predicted_kl")
        stats |= {name: value / count for name, value in zip(names, sums)}
        kept = zip(("predicted_change_kept", "predicted_kl_kept"), sums[len(names) :], strict=True)
        stats |= {name: value / left.clamp_min(1.0) for name, value in kept}


class _Piece:
    """What is noted of the tokens of one forward pass."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.sums: list[tuple[Tensor, Tensor]] = []
        """Sum ``[V, H]`` and number ``[V]`` of the kept gradients of every row."""
        self.stats: Tensor | None = None

    def add(self, tokens: Tokens, found: Prediction, good: Tensor, adam: bool) -> None:
        kept = good.all(0)
        self.kept.append(kept)
        some = kept.to(found.fisher.dtype)
        numbers = (torch.ones_like(some), some, 1.0 - some, ~good[0], ~good[1], found.objective, found.fisher,
                   found.objective * some, found.fisher * some)  # fmt: skip
        sums = torch.stack([x.double().sum() for x in numbers])
        self.stats = sums if self.stats is None else self.stats + sums
        if adam:
            width, rows = tokens.hidden.shape[1], int(tokens.rows.max()) + 1
            index = tokens.rows[kept].flatten()
            total = tokens.hidden.new_zeros(rows, width).index_add(0, index, tokens.gradient[kept].flatten(0, 1))
            number = tokens.hidden.new_zeros(rows).index_add(0, index, torch.ones_like(tokens.pi[kept].flatten()))
            self.sums.append((total, number))


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
