"""GRPO-Guard: ratios of denoising steps before and after normalisation, on exact data in 16 dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.packages import check_siblings
from scripts.reproductions import Measurement

check_siblings("agents", "envs")

import envs  # noqa: F401  (registers its tasks)
from agents.flow.agent import ExactVelocity
from agents.flow.flow_grpo import FlowGRPO
from agents.flow.grpo_guard import GRPOGuard
from ccrl.data import Data
from ccrl.diffusion import flow_grid, make_schedule
from ccrl.policies.flow import FlowPolicy

__all__ = ["Ratios", "gradient_scales", "ratios_by_step", "run"]

SHAPE: dict[str, Any] = {
    "n_prompts": 8, "group_size": 16, "n_epochs": 4, "steps": 10, "time_shift": 3.0, "trained_steps": 10,
    "learning_rate": 3e-3, "max_grad_norm": 0.0, "clip_low": 2e-3, "clip_high": 2e-3,
    "compile": "off",
}  # fmt: skip
ITERATIONS = 40


class TanhMLP(nn.Module):
    """``[x, t] -> 32 -> x``, the last layer zero."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(size + 1, 32), nn.Linear(32, size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.first(torch.cat([x, time.expand(x.shape[:-1]).unsqueeze(-1)], -1))))
        return found


def _small_model(agent: Any) -> FlowPolicy:
    return FlowPolicy(TanhMLP(agent.task.size), base=ExactVelocity(agent.task))


@dataclass(frozen=True)
class Ratios:
    """By denoising step ``[T]``, over passes 2 to 4 of all iterations."""

    time: Tensor
    bias: Tensor
    """Mean ratio less 1."""
    variance: Tensor
    """Of the ratio."""
    above: Tensor
    """P(ratio > 1 + eps | A > 0)."""
    below: Tensor
    """P(ratio < 1 - eps | A < 0)."""
    rewards: tuple[float, ...]
    """Mean proxy reward of every iteration's samples."""

    @property
    def clipped(self) -> Tensor:
        """Of both sides."""
        return 0.5 * (self.above + self.below)


def ratios_by_step(method: Any, seed: int, iterations: int = ITERATIONS, **settings: Any) -> Ratios:
    """Train ``method`` and watch its ratios as its clipping sees them."""
    made = type("Small", (method.agent(),), {"make_model": _small_model})
    agent = made("normal", env_kwargs={"dimensions": 16}, seed=seed, **(SHAPE | settings))
    agent.before_learning()
    recipe, ctx = agent.estimator, agent.ctx
    phase, eps = recipe.phases()[0], agent.config.clip_high
    policy_term = phase.terms[0]
    sums, counts = torch.zeros(4, agent.config.steps).double(), torch.zeros(2, agent.config.steps).double()
    rows, rewards = 0, list[float]()
    for _ in range(iterations):
        (request,) = recipe.plan({}, {}, ctx)
        data = agent.collector.collect(request, agent.policy)
        rewards.append(float(data["episode_reward"].mean()))
        on = recipe.prepare({"on": data}, ctx)["on"]
        for epoch in range(agent.config.n_epochs):
            batch = on.epoch(phase.batching, None)[0]
            if epoch:
                with torch.no_grad():
                    outputs = agent.policy(batch, policy_term.want)
                    rho = policy_term.ratio(outputs, batch).ratio.double()
                good, bad = batch["advantage"] > 0, batch["advantage"] < 0
                sums[0] += (rho - 1.0).sum(1)
                sums[1] += (rho - 1.0).square().sum(1)
                sums[2] += (good & (rho > 1.0 + eps)).sum(1)
                sums[3] += (bad & (rho < 1.0 - eps)).sum(1)
                counts += torch.stack([good.sum(1), bad.sum(1)])
                rows += rho.shape[1]
            for i in range(batch.shape[0]):  # one Adam step per denoising step
                phase.updater.step(phase.terms, _only(batch, i))
    bias = sums[0] / rows
    return Ratios(
        agent.collector.sampling.schedule.time, bias, sums[1] / rows - bias.square(), sums[2] / counts[0],
        sums[3] / counts[1], tuple(rewards),
    )  # fmt: skip


def _only(batch: Data, i: int) -> Data:
    """The batch with one valid denoising step."""
    valid = torch.zeros_like(batch["valid"])
    valid[i] = batch["valid"][i]
    return Data({**batch, "valid": valid, "n_valid": valid.sum()}, sequence=batch.sequence, scalars=batch.scalars)


def gradient_scales() -> dict[str, float]:
    """Largest over smallest gradient scale by step: raw, normalised, weighted."""
    s = make_schedule(flow_grid(10, 3.0), "flow_sde", 0.7)
    beta, width = s.v / s.dt, -s.dt
    scales = {"raw": width * beta / s.std, "normalised": width * beta, "weighted": beta}
    return {name: float(x.max() / x.min()) for name, x in scales.items()}


def run(seeds: list[int]) -> list[Measurement]:
    """Scales of the gradient, then both methods' ratios at equal clip ranges."""
    scales = gradient_scales()
    rows = [
        Measurement(f"largest over smallest gradient scale of a step, {name}", expected, accept, (scales[name],))
        for name, expected, accept in (
            ("raw", "30.2 = 1.5403 / 0.0510", (30.1, 30.3)), ("normalised", "8.7", (8.65, 8.75)),
            ("weighted", "1.245 = 1 + a^2 / 2", (1.2449, 1.2451)),
        )
    ]  # fmt: skip
    plain, guard = ([ratios_by_step(m, seed) for seed in seeds] for m in (FlowGRPO, GRPOGuard))
    place = {0.923: 2, 0.75: 5, 0.429: 8}
    for t, i in place.items():
        expected = {0.923: -3.9e-5, 0.75: -2.2e-4, 0.429: -1.3e-3}[t]
        rows.append(Measurement(
            f"Flow-GRPO: mean ratio less 1 at t = {t}", f"{expected:g}, within a factor of 2 (reference run)",
            (2.0 * expected, 0.5 * expected), tuple(float(r.bias[i]) for r in plain),
        ))  # fmt: skip
    # where noise is left: the last steps
    low = slice(3, 10)
    rows += [
        Measurement("largest |mean ratio less 1| over t <= 0.875: Flow-GRPO over Guard",
                    "an order of magnitude: 1.3e-3 over 1.3e-4", (3.0, math.inf),
                    tuple(float(p.bias[low].abs().max() / g.bias[low].abs().max()) for p, g in zip(plain, guard))),
        Measurement("Flow-GRPO: P(clipped | A < 0) less P(clipped | A > 0), smallest over t < 0.95", "> 0", (0.0,
        math.inf),
                    tuple(float((p.below - p.above)[2:].min()) for p in plain)),
        Measurement("Flow-GRPO: clipped fraction, largest over smallest step", "20", (8.0, 60.0),
                    tuple(float(p.clipped.max() / p.clipped.min()) for p in plain)),
        Measurement("Guard: clipped fraction, largest over smallest step", "3.5", (2.0, 6.0),
                    tuple(float(g.clipped.max() / g.clipped.min()) for g in guard)),
        Measurement("variance of the ratio, largest over smallest step: Flow-GRPO over Guard", "> 1", (1.0, math.inf),
                    tuple(float((p.variance.max() / p.variance.min()) / (g.variance.max() / g.variance.min()))
                          for p, g in zip(plain, guard))),
    ]  # fmt: skip
    return rows
