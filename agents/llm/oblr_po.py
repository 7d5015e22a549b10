"""OBLR-PO: Optimal Baseline and Learning-Rate Policy Optimization (Huang, Sheng, Zheng 2025, arXiv 2511.23310). A
RECONSTRUCTION: the paper's equations were not available; these are the standard derivation of what its abstract says
(docs/llm/oblr_po.md).

For ``g = (1 / NG) sum s_ij (r_ij - b_ij)`` with scores ``s = grad log pi(o|q)``, weights ``w = |s|^2``:

    b*(q)  = E[w r] / E[w]                                  the baseline of least variance
    b_ij   = sum_k w_ik r_ik / sum_k w_ik, over k != j      leave one out (unbiased), or over all k
    w_t    = 1 - 2 pi(o_t) + sum_v pi(v)^2                  logit: exact for a table of logits; w = sum_t w_t
    eta_t  = eta rho,  rho = S / (S + V)                    step size by the signal-to-noise ratio of the gradient
    V      = sum_m |g_m - gbar|^2 / (M (M - 1)),  S = |gbar|^2 - V      of M pieces of the prompts, averaged over steps

The step maximises the lower bound ``eta |grad J|^2 - L eta^2 / 2 (|grad J|^2 + Var)`` of the gain at eta = 1 / L.
Slots: stage = a baseline weighted by scores; updater = the step size. No division by a deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor, nn

from agents.llm.agent import LLMMethod
from ccrl.data import Data, Field, masked
from ccrl.estimators.base import Stage
from ccrl.estimators.groups import Groups
from ccrl.estimators.recipe import Aggregation, MethodConfig, Parts, Recipe
from ccrl.estimators.rollouts import evaluate_columns
from ccrl.estimators.terms import Term
from ccrl.estimators.updates import GradientEstimate, Stats, Updater
from ccrl.returns import discounted_sum
from ccrl.settings import ConfigError, Natural, Range, Unit

__all__ = [
    "OBLRPO",
    "GradientNoise",
    "OBLRPOConfig",
    "OBLRPORecipe",
    "ScaledUpdater",
    "ScoreBaseline",
    "exact_score_norms",
    "weighted_advantages",
]  # fmt: skip


@dataclass(frozen=True)
class OBLRPOConfig(MethodConfig):
    """The reconstruction's settings; the paper's are not known."""

    baseline_weight: Literal["logit", "length", "exact"] = "logit"
    """A completion weighs in the baseline by the squared norm of its score in the logits (logit), by its length, or by
    the squared norm of its score in the parameters (exact: a backward pass per completion)."""
    baseline: Literal["leave_one_out", "self"] = "leave_one_out"
    """A completion's baseline is over the others of its group (leave_one_out: unbiased), or over all (self: biased and
    of less variance in small groups)."""
    granularity: Literal["sequence", "token"] = "sequence"
    """A completion has one baseline (sequence), or one per position from the weights up to it (token)."""
    snr_pieces: Natural = 4
    """The gradient is measured in this many pieces of the prompts, and the step size follows its signal-to-noise ratio;
    0 leaves the step size alone."""
    snr_decay: Annotated[float, Range(0.0, 1.0, below=True)] = 0.9
    """Signal and noise are averaged over steps with this decay."""
    snr_floor: Unit = 0.05
    """The step size falls to no less than this share."""
    snr_warmup: Natural = 0
    """The first so many steps have the whole step size."""
    aggregate: Aggregation = "sequence_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity == "token" and self.baseline_weight == "exact":
            raise ConfigError("baseline_weight: expected 'logit' or 'length' with granularity='token' (scores of "
                              "prefixes), got 'exact'")  # fmt: skip
        if self.snr_pieces == 1:
            raise ConfigError("snr_pieces: expected at least 2 (noise is measured between them), or 0, got 1")
        for f in fields(self):
            unread = not self.snr_pieces and f.name in ("snr_decay", "snr_floor", "snr_warmup")
            if unread and getattr(self, f.name) != f.default:
                raise ConfigError(f"{f.name}: expected {f.default!r} with snr_pieces=0, which leaves the step size "
                                  f"alone, got {getattr(self, f.name)!r}")  # fmt: skip


# -- baseline ---------------------------------------------------------------------------------------------------------


def weighted_advantages(value: Tensor, weight: Tensor, inside: Tensor, groups: Groups, leave_one_out: bool) -> Tensor:
    """``value - b`` ``[T, N]``, 0 outside: in every row a group's baseline is over its members there.

    A member alone has baseline 0. Weights that add up to 0 count alike. Equal values give exactly 0.

    :param value, weight: ``[T, N]``. :param inside: ``[T, N]`` bool.
    """
    index = groups.index.expand(value.shape)

    def total(x: Tensor) -> Tensor:
        """``[T, N]``: of each one's group, over its members in the row."""
        rows = torch.zeros(len(x), len(groups.count), dtype=torch.float64, device=x.device)
        return rows.index_add(1, groups.index, torch.where(inside, x, 0.0)).gather(1, index)

    def extreme(how: str, empty: float) -> Tensor:
        rows = torch.full((len(value), len(groups.count)), empty, dtype=torch.float64, device=value.device)
        return rows.scatter_reduce(1, index, torch.where(inside, value, empty), how).gather(1, index)

    value, weight = value.double(), torch.where(inside, weight.double(), 0.0)
    count = total(torch.ones_like(value))
    # about the mean, so that a large common value costs no digits
    centred = value - total(value) / count.clamp_min(1.0)
    sums, products, others = total(weight), total(weight * centred), count
    plain = torch.zeros_like(centred)
    if leave_one_out:
        rest = sums - weight
        empty, products, others = rest <= 1e-12 * sums, products - weight * centred, count - 1.0
        sums, plain = rest, -centred / others.clamp_min(1.0)
    else:
        empty = sums <= 0.0
    baseline = torch.where(empty, plain, products / torch.where(empty, 1.0, sums))
    equal = extreme("amax", -torch.inf) == extreme("amin", torch.inf)
    found = torch.where(equal, 0.0, centred - baseline)
    return torch.where(inside, torch.where(count == 1, value, found), 0.0)


def exact_score_norms(policy: nn.Module, data: Data) -> Tensor:
    """``|grad_theta sum_t log pi(o_t)|^2`` ``[N]``: a backward pass per completion.

    :raises ValueError: for a policy whose log-probabilities depend on no parameter.
    """
    params = [p for p in policy.parameters() if p.requires_grad]
    norms = []
    for piece in data.microbatches(1):
        with torch.enable_grad():
            log_prob = policy(piece, frozenset({"log_prob"}))["log_prob"]
            total = masked(log_prob, piece["valid"]).sum()
        if not total.requires_grad:
            raise ValueError("exact score norms: expected log-probabilities with a gradient, got constants; use "
                             "baseline_weight='logit' or 'length'")  # fmt: skip
        found = torch.autograd.grad(total, params, allow_unused=True)
        norms.append(torch.stack([g.double().square().sum() for g in found if g is not None]).sum())
    return torch.stack(norms)


@dataclass(frozen=True)
class ScoreBaseline:
    """``advantage`` ``[T, N]``, and ``score_norm`` ``[N]`` (the weight of the whole sequence)."""

    config: OBLRPOConfig
    policy: nn.Module

    def __call__(self, data: Data) -> Data:
        c, valid, reward, groups = self.config, data["valid"], data["episode_reward"], Groups(data["group"])
        inside, loo = valid > 0, c.baseline == "leave_one_out"
        length = inside.sum(0).clamp_min(1)
        norm: Tensor
        if c.baseline_weight == "exact":
            norm = exact_score_norms(self.policy, data)
        else:
            tokens = self.token_norms(data)
            norm = tokens.sum(0)
        if c.granularity == "token":
            # of all that is present: a completion that is cut inside a reply has its reward there
            present = data["present" if "present" in data else "valid"]
            value = discounted_sum(masked(data["reward"], present), 1.0, data["carry"])
            advantage = weighted_advantages(value, tokens.cumsum(0), inside, groups, loo)
        else:
            # the score of a mean over tokens
            norm = norm / length.square() if c.aggregate == "sequence_mean_token_mean" else norm
            some = torch.ones_like(inside[:1])
            advantage = weighted_advantages(reward[None], norm[None], some, groups, loo)
        advantage = advantage.to(reward.dtype).expand(data.shape) * inside
        return data.derive(advantage=advantage).derive_sequence(score_norm=norm.to(reward.dtype))

    def token_norms(self, data: Data) -> Tensor:
        """``[T, N]``, 0 where not valid."""
        valid, columns = data["valid"], self.config.microbatch or None
        if self.config.baseline_weight == "length":
            return (valid > 0).double()
        if "sum_pi2" in data:  # the sampler's
            squares = data["sum_pi2"]
        else:
            squares = evaluate_columns(self.policy, data, frozenset({"sum_pi2"}), columns)["sum_pi2"]
        chosen = masked(data["log_prob"], valid).double().exp()
        return torch.where(valid > 0, (1.0 - 2.0 * chosen + squares.double()).clamp_min(0.0), 0.0)


# -- step size --------------------------------------------------------------------------------------------------------


class GradientNoise(nn.Module):
    """Averages of the gradient's signal and noise over steps, and the factor of the step size."""

    signal: Tensor
    noise: Tensor
    steps: Tensor

    def __init__(self, decay: float = 0.9, floor: float = 0.05, warmup: int = 0) -> None:
        super().__init__()
        self.decay, self.floor, self.warmup = decay, floor, warmup
        for name in ("signal", "noise", "steps"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @staticmethod
    def variance(square: Tensor, squares: Tensor, share: Tensor) -> Tensor:
        """``V`` (0-d), unbiased for the variance of the mean gradient, from its squared norm (0-d) and those ``[M]`` of
        its summands ``share_m g_m``; ``share`` ``[M]`` of all sequences adds up to 1."""
        return ((squares / share).sum() - square).clamp_min(0.0) / (len(squares) - 1)

    def move(self, square: Tensor, variance: Tensor) -> Tensor:
        """``rho`` (0-d) after a gradient of this squared norm and variance (0-d).

        What is averaged is ``|gbar|^2 - V`` before it is cut at 0: cut first, its mean would be too large. Numbers that
        are not finite are left out: the updater leaves out their step.
        """
        keep = torch.where(self.steps > 0, self.decay, 0.0)
        finite = square.isfinite() & variance.isfinite()
        keep = torch.where(finite, keep, 1.0)
        square, variance = torch.where(finite, square, 0.0), torch.where(finite, variance, 0.0)
        self.signal.lerp_((square - variance).to(self.signal), 1.0 - keep)
        self.noise.lerp_(variance.to(self.noise), 1.0 - keep)
        self.steps.add_(finite.to(self.steps))
        signal = self.signal.clamp_min(0.0)
        both = signal + self.noise
        rho = torch.where(both > 0, signal / torch.where(both > 0, both, 1.0), 0.0)
        return torch.where(self.steps <= self.warmup, 1.0, rho.clamp_min(self.floor))


class ScaledUpdater:
    """Another updater whose every step is scaled by the signal-to-noise ratio of its gradient, measured before norms
    are clipped and moments see it. Everything else is the other's."""

    def __init__(self, inner: Updater, noise: GradientNoise, pieces: int) -> None:
        self.inner, self.noise_of, self.pieces = inner, noise, pieces

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.inner, name)

    def step(self, terms: tuple[Term, ...], batch: Data) -> Stats:
        """One update. A batch of one prompt says nothing of the noise: the whole step."""
        pieces, share = self.split(batch)
        first = self.inner.gradient(terms, pieces[0])
        # pieces divide by the counts of the whole batch: gradients and statistics add up. A copy: the next gradient may
        # be written over this one
        total, stats, squares = first.mean.clone(), dict(first.stats), [first.mean.double().square().sum()]
        for piece in pieces[1:]:
            found = self.inner.gradient(terms, piece)
            total += found.mean
            stats = {k: stats[k] + found.stats[k] for k in stats}
            squares.append(found.mean.double().square().sum())
        rho = torch.ones((), dtype=torch.float64, device=total.device)
        if len(pieces) > 1:
            square = total.double().square().sum()
            variance = GradientNoise.variance(square, torch.stack(squares), share)
            rho = self.noise_of.move(square, variance)
            stats |= {"gradient_signal": square - variance, "gradient_noise": variance}
        whole = self.inner.lr.clone()
        self.inner.lr.mul_(rho)
        stats |= self.inner.apply(GradientEstimate(total, stats))
        self.inner.lr.copy_(whole)
        return stats | {"step_factor": rho}

    def run(self, terms: tuple[Term, ...], batches: Sequence[Data]) -> Stats:
        """One update per batch, in order; statistics are means over the batches."""
        rows = [self.step(terms, batch) for batch in batches]
        return {k: torch.stack([r[k] for r in rows]).mean() for k in rows[0].keys() & rows[-1].keys()}

    def split(self, batch: Data) -> tuple[list[Data], Tensor]:
        """Pieces of whole prompts, about equally many each, and each one's share ``[M]`` of the sequences."""
        label = torch.unique(batch["group"], return_inverse=True)[1]
        filled = (batch["valid"] > 0).any(0)
        prompts = int(label.max()) + 1
        count = min(self.pieces, prompts)
        piece = label * count // prompts
        members = [(piece == m).nonzero().squeeze(-1) for m in range(count)]
        sizes = torch.stack([filled[m].sum() for m in members]).double()
        kept = (sizes > 0).nonzero().squeeze(-1).tolist()
        return [batch.take(members[m]) for m in kept], sizes[kept] / sizes.sum()


# -- the method -------------------------------------------------------------------------------------------------------


class OBLRPORecipe(Recipe):
    """The weighted baseline; with ``snr_pieces`` an updater whose step size follows the gradient's noise."""

    optional_fields = (Field("sum_pi2"),)

    def __init__(self, config: Any, parts: Parts) -> None:
        outputs = getattr(parts.policy, "outputs", None)
        if config.baseline_weight == "logit" and outputs is not None and "sum_pi2" not in outputs():
            raise ValueError("baseline_weight='logit' reads the squared probabilities of a token policy: expected one "
                             "that computes 'sum_pi2'; use baseline_weight='length' or 'exact'")  # fmt: skip
        super().__init__(config, parts)
        if config.snr_pieces:
            self.noise = GradientNoise(config.snr_decay, config.snr_floor, config.snr_warmup)
            updater = cast(Updater, ScaledUpdater(parts.updater, self.noise, config.snr_pieces))
            (phase,) = self._phases
            self._phases = (replace(phase, updater=updater),)

    def stages(self) -> tuple[Stage, ...]:
        return (ScoreBaseline(self.config, self.parts.policy),)


OBLRPO = LLMMethod(
    "oblr_po",
    "Huang, Sheng, Zheng 2025, arXiv 2511.23310 (reconstruction)",
    OBLRPOConfig,
    OBLRPORecipe,
    {
        "advantage": "reward - mean of the others weighted by squared scores",
        "ratio": "token",
        "loss": "clip",
        "updater": "step size x S / (S + V) of the gradient",
        "aggregate": "sequence sums",
    },
)
"""Optimal Baseline and Learning-Rate Policy Optimization: the baseline of least variance, steps by signal to noise."""
