"""A reward model of one's own: a scalar head on any causal language model, and the losses that train it.

    pairs       -log sigmoid(r(x, y_w) - r(x, y_l)) [+ c (r_w + r_l)^2]      Ouyang et al. 2022, eq. 1
    verdicts    cross entropy of sigmoid(r) with verdicts in [0, 1], or (r - score)^2

The head reads the last token of prompt and completion. ``Scored`` is the model as an updater sees it; the data are
``ccrl.llm.judged.Judged``, the agent that trains it ``agents.llm.reward_model.RewardTrainer``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.llm.policy import backbone, check_positions, model_positions, positions_of

__all__ = ["CausalReward", "Scored", "compared", "pair_terms", "verdict_terms"]


class CausalReward(nn.Module):
    """A reward model (``ccrl.llm.reward_model.RewardModel``) in the tokens of the policy that it judges.

    :param model: any ``AutoModelForCausalLM``; its vocabulary projection is left out.
    :raises ValueError: in a call, for a text of more tokens than the model has positions.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.positions = model_positions(model)
        self.body = backbone(model).eval()
        weight = next(p for p in self.body.parameters() if p.dim() > 1)
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
            width = self.body(input_ids=ids, use_cache=False).last_hidden_state.shape[-1]
        self.head = nn.Linear(width, 1, bias=False, dtype=weight.dtype, device=weight.device)
        # rewards begin with a variance of about 1 (Stiennon et al. 2020)
        nn.init.normal_(self.head.weight, std=(width + 1) ** -0.5)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def train(self, mode: bool = True) -> CausalReward:
        """Stays in evaluation mode: a completion has one reward."""
        return super().train(False)

    def forward(self, batch: Data) -> Tensor:
        """``[B]``: the rewards of a batch with ``prompt``, ``prompt_valid`` ``[B, P]``, ``action``, ``present``
        ``[T, B]``. An empty completion is judged by its prompt."""
        attention = torch.cat([batch["prompt_valid"], batch["present"].t()], 1).long()
        tokens = torch.cat([batch["prompt"], batch["action"].t()], 1)
        if self.positions is not None and attention.shape[1] > self.positions:
            # the longest prompt and the longest completion may be of two texts
            length, row = attention.sum(1).max(0)
            prompt = int(batch["prompt_valid"][row].sum())
            check_positions(self.positions, prompt, int(length) - prompt + 1, "the longest text's prompt")
        # padding may be no token at all, and would be an index
        hidden = self.body(
            input_ids=torch.where(attention > 0, tokens, 0), attention_mask=attention,
            position_ids=positions_of(attention), use_cache=False,
        ).last_hidden_state  # fmt: skip
        place = torch.arange(attention.shape[1], device=attention.device)
        last = (attention * place).argmax(1)
        found: Tensor = self.head(hidden[torch.arange(len(last), device=last.device), last]).squeeze(-1)
        return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


class Scored(nn.Module):
    """A reward model of completions with the face of a policy: its forward output is ``score`` ``[1, B]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def outputs(self) -> frozenset[str]:
        return frozenset({"score"})

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """:raises ValueError: the model does not give one number per completion."""
        score = self.model(batch)
        if score.shape != (batch.shape[1],):
            raise ValueError(f"reward model: expected a number per completion, [{batch.shape[1]}], got "
                             f"{list(score.shape)}")  # fmt: skip
        return {"score": score.unsqueeze(0)}


# -- pairs ----------------------------------------------------------------------------------------------------------


def compared(outputs: Outputs, batch: Data) -> LogRatio:
    """``r(chosen) - r(rejected)`` of every pair, on the column of the chosen one ``[1, B]``; not valid elsewhere.

    A pair is two columns of one ``group``, told apart by ``preferred`` (+1, -1).
    """
    score = outputs["score"]
    sign, partners = _pairs(batch, score.dtype)
    whole = (sign > 0) & ((sign < 0).to(score.dtype) @ partners > 0)
    return LogRatio((sign * score[0] @ partners).unsqueeze(0), torch.zeros_like(score), whole.to(score.dtype)[None])


def pair_terms(center: float = 0.0) -> tuple[Term, ...]:
    """Bradley-Terry, averaged over the pairs of a batch.

    :param center: weight of ``(r_w + r_l)^2``, which takes away the freedom to add a number to all rewards (Eisenstein
        et al. 2023).
    """
    terms = [Term("pair_loss", _bradley_terry, _per_pair, compared, frozenset({"score"}), None, stats=_pair_stats)]
    if center:
        terms.append(Term("center_loss", _centered, _per_pair, compared, frozenset({"score"}), None, coef=center))
    return tuple(terms)


def _pairs(batch: Data, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    group = batch["group"]
    sign = batch["preferred"].to(dtype) * (batch["valid"] > 0).any(0)
    return sign, (group.unsqueeze(0) == group.unsqueeze(1)).to(dtype)


def _per_pair(valid: Tensor, batch: Data) -> Tensor:
    return valid / batch["n_groups"]


def _bradley_terry(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    return -F.logsigmoid(ratio.log_ratio)


def _centered(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    score = outputs["score"]
    sign, partners = _pairs(batch, score.dtype)
    return (sign.abs() * score[0] @ partners).square().unsqueeze(0)


def _pair_stats(ratio: Any, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
    margin = ratio.log_ratio
    return {"margin": margin, "pair_accuracy": (margin > 0).to(margin.dtype)}


# -- verdicts -------------------------------------------------------------------------------------------------------


def verdict_terms(kind: Literal["probability", "score"]) -> tuple[Term, ...]:
    """Against the column ``verdict`` ``[B]``, averaged over completions: cross entropy of ``sigmoid(r)`` where verdicts
    are in [0, 1] (probability), or the squared error (score)."""
    loss = _cross_entropy if kind == "probability" else _squared_error
    return (Term("verdict_loss", loss, _per_completion, _said, frozenset({"score"}), None),)


def _said(outputs: Outputs, batch: Data) -> LogRatio:
    score = outputs["score"]
    here = (batch["valid"] > 0).any(0, keepdim=True).to(score.dtype)
    return LogRatio(score, torch.zeros_like(score), here)


def _per_completion(valid: Tensor, batch: Data) -> Tensor:
    return valid / batch["n_sequences"]


def _cross_entropy(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    wanted = batch["verdict"].to(ratio.log_prob.dtype).unsqueeze(0)
    return F.binary_cross_entropy_with_logits(ratio.log_prob, wanted, reduction="none")


def _squared_error(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    return (ratio.log_prob - batch["verdict"].to(ratio.log_prob.dtype).unsqueeze(0)).square()
