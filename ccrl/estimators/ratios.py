"""The ratio slot: which log-probabilities are compared, at which level."""

from __future__ import annotations

from ccrl.data import Data, masked_mean, masked_sum
from ccrl.estimators.terms import LogRatio, Outputs

__all__ = ["plain", "reference", "sequence", "sequence_product", "sequence_token", "token"]


def token(outputs: Outputs, batch: Data) -> LogRatio:
    """Per step against the behaviour policy (PPO, GRPO, MDPO, BPO)."""
    return LogRatio(outputs["log_prob"], batch["log_prob"], batch["valid"])


def plain(outputs: Outputs, batch: Data) -> LogRatio:
    """Denominator = the policy itself: ratio 1 with the score as gradient (REINFORCE, SFT)."""
    return LogRatio(outputs["log_prob"], outputs["log_prob"].detach(), batch["valid"])


def reference(outputs: Outputs, batch: Data) -> LogRatio:
    """The reference policy over the policy, gradient in the denominator: ``k1``, ``k2``, ``k3`` of this level are those
    of ``KL(pi || ref)`` under the policy's own samples (docs/llm/baselines.md)."""
    return LogRatio(batch["ref_log_prob"], outputs["log_prob"], batch["valid"])


def sequence(outputs: Outputs, batch: Data) -> LogRatio:
    """Length-normalised sequence ratio ``exp(mean_t log-ratio)``, one element per column ``[1, B]`` (GSPO)."""
    valid = batch["valid"]
    return LogRatio(
        masked_mean(outputs["log_prob"], valid),
        masked_mean(batch["log_prob"], valid),
        (valid.sum(0, keepdim=True) > 0).to(valid.dtype),
    )


def sequence_product(outputs: Outputs, batch: Data) -> LogRatio:
    """The ratio of whole sequences ``exp(sum_t log-ratio)``, one element per column ``[1, B]`` (TRL's RLOO)."""
    valid = batch["valid"]
    return LogRatio(
        masked_sum(outputs["log_prob"], valid),
        masked_sum(batch["log_prob"], valid),
        (valid.sum(0, keepdim=True) > 0).to(valid.dtype),
    )


def sequence_token(outputs: Outputs, batch: Data) -> LogRatio:
    """The sequence ratio's value on every token, gradient through the token only (GSPO-token; Zheng et al. 2025)."""
    valid, log_prob = batch["valid"], outputs["log_prob"]
    mean = masked_mean(log_prob.detach() - batch["log_prob"], valid)
    return LogRatio(log_prob, log_prob.detach() - mean, valid)
