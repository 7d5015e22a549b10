"""How good a reward model is: accuracy on pairs, calibration, ranking, and the share of a score that it explains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.llm.judged import Judged

__all__ = ["auc", "calibration_error", "evaluate_reward", "r_squared", "rewards_of"]


@torch.no_grad()
def rewards_of(model: nn.Module, judged: Judged, microbatch: int | None = None) -> Tensor:
    """``[N]`` float64: what the model says of every completion, ``microbatch`` of them at a time."""
    return torch.cat([model(piece).double() for piece in judged.data.microbatches(microbatch)])


def evaluate_reward(
    model: nn.Module, judged: Judged, microbatch: int | None = None, probability: bool = True
) -> dict[str, float]:
    """Numbers of a reward model on judgements that it was not trained on.

    Pairs: ``loss`` (Bradley-Terry, nats), ``accuracy``, ``margin``, ``calibration_error`` of ``sigmoid(|margin|)`` as
    the probability that the pair is the way round that the model says. Verdicts: ``r2`` of the model's numbers,
    ``r2_fitted`` after the best straight line, ``auc`` and ``accuracy`` of verdicts of at least one half against less,
    and, where rewards are logits of a ``probability``, ``loss``, ``brier`` and ``calibration_error``.
    """
    reward = rewards_of(model, judged, microbatch)
    if judged.kind == "pairs":
        margin = reward[0::2] - reward[1::2]
        # a tie is no decision: half right
        right = (margin > 0).double() + 0.5 * (margin == 0).double()
        return {
            "loss": float(F.softplus(-margin).mean()), "accuracy": float(right.mean()), "margin": float(margin.mean()),
            "calibration_error": calibration_error(margin.abs().sigmoid(), right),
        }  # fmt: skip
    verdict = judged.data["verdict"].double()
    said, high = reward.sigmoid() if probability else reward, (verdict >= 0.5).double()
    found = {
        "r2": r_squared(said, verdict), "r2_fitted": r_squared(said, verdict, fitted=True), "auc": auc(said, high),
        "accuracy": float(((said >= 0.5).double() == high).double().mean()),
    }  # fmt: skip
    if probability:
        found["loss"] = float(F.binary_cross_entropy_with_logits(reward, verdict))
        found["brier"] = float((said - verdict).square().mean())
        found["calibration_error"] = calibration_error(said, verdict)
    return found


def calibration_error(probability: Tensor, outcome: Tensor, bins: int = 10) -> float:
    """Expected calibration error: ``sum_b n_b / n |mean outcome - mean probability|`` over ``bins`` equal parts of
    [0, 1] (Naeini et al. 2015).

    :raises ValueError: a probability outside [0, 1].
    """
    if not bool(((probability >= 0) & (probability <= 1)).all()):
        raise ValueError("calibration_error: expected probabilities in [0, 1], got "
                         f"{float(probability.min()):.3g} to {float(probability.max()):.3g}")  # fmt: skip
    part = (probability * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=part.device)
    gap.index_add_(0, part, (outcome - probability).double())
    return float(gap.abs().sum() / len(part))


def r_squared(said: Tensor, truth: Tensor, fitted: bool = False) -> float:
    """``1 - sum (truth - said)^2 / sum (truth - mean)^2``; ``fitted``: of the best straight line through ``said``, the
    squared correlation. NaN where the truth is constant."""
    truth, said = truth.double(), said.double()
    spread = (truth - truth.mean()).square().sum()
    if float(spread) == 0.0:
        return float("nan")
    if fitted:
        centred = said - said.mean()
        size = centred.square().sum()
        return float((centred @ (truth - truth.mean())).square() / (size * spread)) if float(size) > 0.0 else 0.0
    return float(1.0 - (truth - said).square().sum() / spread)


def auc(said: Tensor, positive: Tensor) -> float:
    """Probability that a positive (1) has a larger number than a negative (0), ties count half; NaN without both."""
    high, low = said[positive > 0.5], said[positive <= 0.5]
    if not len(high) or not len(low):
        return float("nan")
    # ranks of ties are averaged
    _, inverse, counts = torch.unique(torch.cat([high, low]), return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - 0.5 * (counts - 1)).double()[inverse[: len(high)]]
    return float((rank.sum() - 0.5 * len(high) * (len(high) + 1)) / (len(high) * len(low)))
