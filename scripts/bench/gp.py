"""Time and memory of the Gaussian-process solve of DBQPG and BAC: ``python scripts/bench gp``."""

from __future__ import annotations

import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import envs  # noqa: F401  (registers ids)
from agents.bac import BAC, BACConfig
from agents.dbqpg.kernel import DeepKernel
from agents.dbqpg.quadrature import GradientSystem, StateGram

__all__ = ["Config", "main"]


@dataclass
class Config:
    """One gradient's weights ``(c1 K_s + c2 K_F + sigma^2 I)^-1 A`` of N transitions in float64, the kernel matrix
    included: exact (Cholesky), cg (conjugate gradients with a preconditioner of rank 50) and low_rank (pivoted
    Cholesky of the state kernel, then Woodbury; no matrix).

    Kernel: DBQPG's additive one on 10 features of an untrained network, and a Fisher kernel of rank 25. Error: of the
    weights against the exact solve, relative. Memory: peak of a process of its own, above that before the solve.
    BAC's whole gradients follow.
    """

    points: tuple[int, ...] = (500, 1000, 2000, 4000)
    """Transitions N."""
    solvers: tuple[str, ...] = ("exact", "cg", "low_rank", "auto")
    """Which."""
    noise: float = 0.05
    """sigma^2. The smaller, the harder for conjugate gradients."""
    fisher_scale: float = 5e-5
    """c2."""
    rank: int = 25
    """Of the Fisher kernel."""
    tolerance: float = 1e-6
    """cg: relative residual."""
    repeats: int = 3
    """The fastest counts."""
    threads: int = 1
    """torch threads."""
    episodes: tuple[int, ...] = (5, 20)
    """BAC's gradient of a grid policy, with its logged deviation, exact and by cg, from so many episodes of 200 steps
    of the two-action mountain car (201 points each, the last one a bootstrap pair)."""


def main(config: Config) -> None:
    print(", ".join(f"{f.name}={getattr(config, f.name)}" for f in fields(config)))
    print(f"{'N':>6} {'solver':>15} {'seconds':>9} {'MiB':>7} {'error':>9} iterations")
    context = multiprocessing.get_context("spawn")  # a process each: peak memory is one number per process
    for n in config.points:
        exact: torch.Tensor | None = None
        for solver in config.solvers:
            with context.Pool(1) as pool:
                weights, seconds, memory, iterations, kind = pool.apply(_measure, (config, n, solver))
            exact = weights if solver == "exact" else exact
            found = "-" if exact is None else f"{float((weights - exact).norm() / exact.norm()):.1e}"
            name = solver if solver == kind else f"{solver}: {kind}"
            print(f"{n:>6} {name:>15} {seconds:>9.3f} {memory:>7.0f} {found:>9} {iterations or ''}")

    print(f"\n{'points':>6} {'BAC solver':>15} {'seconds':>9} {'error':>9} of the gradient")
    torch.set_num_threads(config.threads)
    for m in config.episodes:
        rows = {solver: _bac(config, m, solver) for solver in ("exact", "cg")}
        for solver, (points, seconds, mean) in rows.items():
            error = float((mean - rows["exact"][2]).norm() / rows["exact"][2].norm())
            print(f"{points:>6} {solver:>15} {seconds:>9.3f} {error:>9.1e}")


def _bac(config: Config, episodes: int, solver: Literal["exact", "cg"]) -> tuple[int, float, torch.Tensor]:
    """Points, seconds of one gradient, the gradient."""
    agent = BAC(
        "ccrl/MountainCarTwoActions-v0", BACConfig(num_envs=episodes, n_steps=200, policy="grid", solver=solver), seed=0
    )
    theta = agent.updaters["policy"].flat
    (request,) = agent.estimator.plan({"on": theta}, {}, agent.ctx)
    data = agent.estimator.prepare({"on": agent.collector.collect(request, agent.policy)}, agent.ctx)["on"]
    seconds = math.inf
    for _ in range(config.repeats):
        start = time.perf_counter()
        mean = agent.estimator.gradient(theta, data, agent.ctx).mean
        seconds = min(seconds, time.perf_counter() - start)
    return data.shape[1], seconds, mean


def _measure(config: Config, n: int, solver: str) -> tuple[torch.Tensor, float, float, int, str]:
    """Weights ``[n]``, seconds, peak MiB, iterations, the solver."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    deep = DeepKernel(17)
    x = torch.randn(n, 17, dtype=torch.float64)
    right, _ = torch.linalg.qr(torch.randn(n, config.rank, dtype=torch.float64))
    targets = torch.randn(n, dtype=torch.float64)
    before = _peak()
    nothing: Callable[[torch.Tensor], torch.Tensor] = lambda v: v  # noqa: E731
    seconds = math.inf
    iterations = 0
    with torch.no_grad():
        for _ in range(config.repeats):
            start = time.perf_counter()
            gram = StateGram(deep.kernel, deep.features(x))
            system = GradientSystem(
                nothing, nothing, gram, right, c1=1.0, c2=config.fisher_scale, noise=config.noise, solver=solver,
                tolerance=config.tolerance,
            )  # fmt: skip
            weights = system.weights(targets)
            seconds = min(seconds, time.perf_counter() - start)
            iterations = getattr(system.solver, "iterations", 0)
    return weights, seconds, _peak() - before, iterations, system.kind


def _peak() -> float:
    """Peak resident MiB of this process."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
