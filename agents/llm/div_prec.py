"""Diversity or precision: a shaped next-token objective. Wu et al. 2025, "Diversity or Precision? A Deep Dive into Next
Token Prediction", arXiv 2512.22955.

Cross entropy is the policy gradient of one step with the reward ``1[a = x] / pi(a)``. Shaped, with ``K`` the ``k`` most
probable tokens of the policy itself, and nothing of it differentiated,

    r(a) = (1 - pi(a))^beta / pi(a)      a = x, the next token          beta < 0: precision, > 0: diversity
         = lam_head                      a in K, a != x
         = lam_tail                      a not in K, a != x

whose expectation over the policy is exact and needs no sample: with ``p = pi(x)``, ``w = (1 - p)^beta`` held fixed and
the masses ``P_K``, ``P_T`` of the head and the tail without ``x``,

    L = -(w log p + lam_head P_K + lam_tail P_T)
    dL/dz_j = -[w (1[j = x] - p_j) + lam_head p_j (1[j in K, not x] - P_K) + lam_tail p_j (1[j in T] - P_T)]

At the end, against tokens of frequencies ``q``, ``p_j`` is proportional to ``q_j (1 - p_j)^beta``. All 0 is cross
entropy. Slots: plan = demonstrations; loss = the shaped one. Reinforcement from there is another method on the model
(docs/llm/div_prec.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from agents.llm.preferences import SFTConfig, SFTRecipe
from ccrl.data import Data
from ccrl.estimators import ratios
from ccrl.estimators.recipe import Parts
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Term
from ccrl.settings import Above, Finite, Natural

__all__ = ["DivPrec", "DivPrecConfig", "DivPrecRecipe", "masses", "shaped", "shaped_ce", "trainer_loss"]

CLOSEST = 1e-6
"""``1 - p`` is at least this: with beta < 0 the weight of a sure token is then finite, and its gradient still
vanishes."""


@dataclass(frozen=True)
class DivPrecConfig(SFTConfig):
    """The precision-oriented setting; others are beta 0.5, and beta 0 with lam_tail -0.1 or with lam_head 0.1."""

    beta: Annotated[float, Above(-1.0)] = -0.25
    """The likelihood of a next token of probability p has the weight (1 - p)^beta: below 0 what is likely counts more
    (precision), above 0 what is unlikely does (diversity)."""
    lam_head: Finite = 0.0
    """A wrong token among the k most probable ones is rewarded with this."""
    lam_tail: Finite = 0.0
    """A wrong token outside these is rewarded with this; below 0 the tail is cut."""
    k: Natural = 100
    """So many of the most probable tokens are the head; lam_head and lam_tail read it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ranks and self.k != 100:
            raise ValueError(f"k: expected 100 with lam_head = lam_tail = 0, which read no head, got {self.k}")
        if self.lam_head and not self.k:
            raise ValueError("k: expected at least 1 with lam_head, whose head would be empty, got 0")

    @property
    def ranks(self) -> bool:
        """Whether wrong tokens are told apart."""
        return bool(self.lam_head or self.lam_tail)


def masses(log_prob: Tensor, token: Tensor, top: Tensor, top_log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """``P_K`` and ``P_T`` ``[...]`` from the log-probability of the next token ``[...]``, the token, the head's tokens
    ``[..., k]`` and their log-probabilities. Which tokens are the head is constant."""
    wrong = top != token.unsqueeze(-1)
    head = torch.where(wrong, top_log_prob, -torch.inf).exp().sum(-1)
    return head, 1.0 - log_prob.exp() - head


def shaped(beta: float, lam_head: float = 0.0, lam_tail: float = 0.0) -> Callable[..., Tensor]:
    """``L`` ``[...]`` of ``(log_prob, head mass, tail mass)``; the masses may be left out where both lambdas are 0."""

    def loss(log_prob: Tensor, head: Tensor | None = None, tail: Tensor | None = None) -> Tensor:
        found = -weight(log_prob, beta) * log_prob
        if lam_head or lam_tail:
            assert head is not None
            assert tail is not None
            found = found - lam_head * head - lam_tail * tail
        return found

    return loss


def weight(log_prob: Tensor, beta: float) -> Tensor:
    """``w = (1 - p)^beta``, detached: with its gradient it would be the focal loss."""
    missing: Tensor = -torch.expm1(log_prob.detach())
    return missing.clamp_min(CLOSEST) ** beta


class DivPrecRecipe(SFTRecipe):
    """Maximum likelihood of the demonstrations, shaped."""

    config: DivPrecConfig

    def __init__(self, config: Any, parts: Parts) -> None:
        if config.ranks:
            if not hasattr(parts.policy, "k"):
                raise ValueError("div_prec ranks tokens with lam_head and lam_tail: expected a token policy, which has "
                                 "its most probable ones, got one without")  # fmt: skip
            parts.policy.k = config.k  # type: ignore[assignment]
        super().__init__(config, parts)

    def loss(self) -> Loss:
        c = self.config
        value = shaped(c.beta, c.lam_head, c.lam_tail)

        def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
            return value(ratio.log_prob, *self._masses(ratio, outputs, batch))

        return loss

    def terms(self) -> tuple[Term, ...]:
        c = self.config
        want = {"log_prob", "topk_index", "topk_log_prob"} if c.ranks else {"log_prob"}
        term = Term(
            "shaped_loss", self.loss(), self.aggregate(), ratios.plain, frozenset(want), advantage=None,
            stats=self._watched,
        )  # fmt: skip
        # of no weight: perplexity and entropy are what the objective trades
        entropy = Term("entropy", _entropy, self.aggregate(), want=frozenset({"entropy"}), advantage=None, coef=0.0)
        return (term, entropy, *self.penalties())

    def _masses(self, ratio: LogRatio, outputs: Outputs, batch: Data) -> tuple[Tensor, ...]:
        if not self.config.ranks:
            return ()
        return masses(ratio.log_prob, batch["action"], outputs["topk_index"], outputs["topk_log_prob"])

    def _watched(self, ratio: Any, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
        found = {"nll": -ratio.log_prob, "weight": weight(ratio.log_prob, self.config.beta)}
        return found | dict(zip(("head_mass", "tail_mass"), self._masses(ratio, outputs, batch)))


def _entropy(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    return outputs["entropy"].detach()


DivPrec = LLMMethod(
    "div_prec",
    "Wu et al. 2025, arXiv 2512.22955",
    DivPrecConfig,
    DivPrecRecipe,
    {"data": "demonstrations", "ratio": "none", "loss": "-(1 - p)^beta log p, rewards of head and tail",
     "aggregate": "token mean"},
    {"n_prompts": 128, "learning_rate": 3e-4, "weight_decay": 0.1, "max_grad_norm": 1.0},
)  # fmt: skip
"""The shaped next-token objective of "Diversity or Precision?" (Wu et al. 2025). The clock counts demonstrations."""


# -- without an agent -----------------------------------------------------------------------------------------------


def shaped_ce(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, *, beta: float = -0.25, lam_head: float = 0.0,
    lam_tail: float = 0.0, k: int = 100,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The objective on logits ``[..., V]`` and next tokens ``[...]``: its mean over ``mask`` ``[...]`` (0-d), and the
    means of ``nll`` (unshaped), ``entropy`` (nats), ``weight``, ``head_mass`` and ``tail_mass``; 0 where the mask is
    empty."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    log_probs = logits.log_softmax(-1)
    log_prob = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    top = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
    head, tail = masses(log_prob, labels, top.indices, top.values)
    mask = torch.ones_like(log_prob) if mask is None else mask.to(log_prob.dtype)

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask > 0, x, torch.zeros_like(x)).sum() / mask.sum().clamp_min(1.0)

    rows = {"nll": -log_prob, "entropy": -(log_probs.exp() * log_probs).sum(-1), "weight": weight(log_prob, beta),
            "head_mass": head, "tail_mass": tail}  # fmt: skip
    return mean(shaped(beta, lam_head, lam_tail)(log_prob, head, tail)), {n: mean(x.detach()) for n, x in rows.items()}


def trainer_loss(
    *, beta: float = -0.25, lam_head: float = 0.0, lam_tail: float = 0.0, k: int = 100
) -> Callable[..., Tensor]:
    """The objective for other trainers: a ``compute_loss_func`` of transformers' ``Trainer`` and TRL's ``SFTTrainer``,
    which calls it with the model's outputs, its labels ``[B, L]`` (-100: no label) and the number of labels of the
    whole optimiser batch."""

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        shown = labels[:, 1:]
        mask = shown != -100
        loss, _ = shaped_ce(
            outputs["logits"][:, :-1], torch.where(mask, shown, 0), mask, beta=beta, lam_head=lam_head,
            lam_tail=lam_tail, k=k,
        )  # fmt: skip
        return loss if num_items_in_batch is None else loss * mask.sum() / num_items_in_batch

    return compute
