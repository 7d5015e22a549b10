"""PPO, a learnt discriminator and its rivals by sampling, on either task (docs/orpo.md)."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.orpo import ORPO
from ccrl.experiment.cells import complete
from ccrl.policies import MLPPolicy
from ccrl.stats import paired_t, t_interval
from envs.hacking import PointGoal, agreement, point_goal
from scripts.studies.hacking.exact import NAN, tomato_reference
from scripts.studies.look import look
from scripts.studies.tables import Rows

__all__ = ["SAMPLED", "Sampled", "judged", "parse", "play_sampled"]

SAMPLED: dict[str, tuple[str, dict[str, Any]]] = {
    "tomato": (
        "ccrl/Tomato-v0",
        {"num_envs": 30, "n_steps": 100, "hidden": (), "critic_hidden": (64, 64), "learning_rate": 0.02, "n_epochs": 4,
         "batch_size": 500, "clip_range": 0.2, "gae_lambda": 0.98, "normalise_advantage": "batch",
         "start_at_reference": False, "ent_coef": 0.01,
         "discriminator_hidden": (64, 64), "discriminator_batch": 500, "discriminator_epochs": 4,
         "reference_steps": 200},
    ),
    "point": (
        "ccrl/PointGoal-v0",
        {"num_envs": 32, "n_steps": 50, "hidden": (), "critic_hidden": (64, 64), "learning_rate": 0.01, "n_epochs": 4,
         "batch_size": 400, "normalise_advantage": "batch", "discriminator_hidden": (64, 64),
         "discriminator_batch": 400, "discriminator_epochs": 4, "reference_steps": 200},
    ),
}  # fmt: skip
"""Task -> environment, settings of the agent."""

TRIED: dict[str, tuple[str, ...]] = {
    "tomato": (
        "none", "sqrt_chi2:1", "sqrt_chi2:0.623", "sqrt_chi2:0.5", "sqrt_chi2:0.3", "sqrt_chi2:0.2", "sqrt_chi2:0.1",
        "action_kl:0.1", "action_kl:0.05", "action_kl:0.03", "action_kl:0.02", "action_kl:0.01",
        "action_kl:0.003", "stop:0.5", "stop:1", "stop:2", "stop:5", "stop:20",
    ),
    "point": (
        "none", "sqrt_chi2:1", "sqrt_chi2:0.5", "sqrt_chi2:0.2", "sqrt_chi2:0.1", "sqrt_chi2:0.05", "sqrt_chi2:0.02",
        "action_kl:0.03", "action_kl:0.01", "action_kl:0.005", "action_kl:0.003", "action_kl:0.001",
        "stop:0.5", "stop:2", "stop:10",
    ),
}  # fmt: skip
"""Task -> methods with their weights."""
LOOKS = {"none": look(6), "sqrt_chi2": look(0), "action_kl": look(1), "stop": look(2)}


def parse(tried: str) -> tuple[str, float]:
    """Method and weight of ``METHOD:WEIGHT`` (``none`` has no weight; that of ``stop`` is the chi^2 to stop at).

    :raises ValueError: another form.
    """
    method, _, weight = tried.partition(":")
    try:
        found = float(weight or 0.0)
    except ValueError:
        found = NAN
    if not (0.0 <= found < math.inf) or (found == 0.0) != (method == "none"):
        raise ValueError(f"tried: expected none or METHOD:WEIGHT such as sqrt_chi2:0.5 or stop:2, got {tried!r}")
    return method, found


@dataclass(frozen=True)
class Sampled:
    """PPO on the proxy with penalties (tomato: from a new policy, point: from the reference); sums over an episode."""

    out: Path
    """Folder of the finished runs."""
    figures: Path = Path("docs/figures")
    """Folder that hacking_* is written to."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""
    seeds: int = 5
    """Runs of each method and weight."""
    iterations: int = 30
    """Rollouts per run."""
    tried: tuple[str, ...] = ()
    """METHOD:WEIGHT of every curve: a regulariser of ORPO and its weight, stop and the estimated chi^2 at which
    training ends, or none; empty: those of the page."""
    task: tyro.conf.Suppress[str] = "tomato"

    @property
    def methods(self) -> list[tuple[str, float]]:
        """Method and weight of every curve."""
        return [parse(text) for text in self.tried or TRIED[self.task]]

    def run(self) -> Rows:
        """Every second point of every curve, the first and the last."""
        cells = [
            {"method": m, "weight": w, "seed": seed, "task": self.task, "iterations": self.iterations}
            for seed in range(self.seeds) for m, w in self.methods
        ]  # fmt: skip
        rows = complete(self.out / f"{self.task}.csv", cells, play_sampled, jobs=self.jobs, name=self.task)
        types = {"method": str, "weight": float, "seed": int, "iteration": int, "true": float, "proxy": float,
                 "chi2": float, "seconds": float}  # fmt: skip
        return [{name: of(row[name] or "nan") for name, of in types.items()} for row in rows]

    def tables(self, rows: Rows) -> list[Rows]:
        """Means over seeds of the last points; and the methods, each at the weight that the other seeds choose."""
        out = []
        for method, weight in self.methods:
            last = _last(rows, method, weight)
            true = [row["true"] for row in last]
            mean, low, high = _interval(true)
            out.append({
                "method": method, "weight": weight, "seeds": len(last), "true return": mean, "95 % from": low,
                "to": high, "worst": min(true), "proxy return": statistics.fmean(row["proxy"] for row in last),
                "chi2_hat": statistics.median(row["chi2"] for row in last),
                "rollouts": statistics.fmean(row["iteration"] for row in last),
            })  # fmt: skip
        found = [out, self.verdict(rows)] if self.seeds > 1 else [out]
        return [*found, self.proxies()] if self.task == "point" else found

    def proxies(self) -> Rows:
        """How every seed's reward model goes with the true reward where the reference goes (1024 episodes), and the c
        of the theory."""
        out = []
        for seed in range(self.seeds):
            env: Any = point_goal(1024, instance=seed)
            generator = torch.Generator().manual_seed(seed)
            act = lambda obs, g=generator: PointGoal.reference(obs, torch.randn(1024, 2, generator=g))  # noqa: E731
            r, true, proxy = agreement(env, act, 50, seed=seed)
            c = math.sqrt(1.0 - r * r)
            out.append({"seed": seed, "correlation": r, "sigma true": true, "sigma proxy": proxy, "c of the theory": c})
        return out

    def verdict(self, rows: Rows) -> Rows:
        """Every method at weights chosen on the other seeds, and its paired difference from sqrt_chi2."""
        scores = {m: judged(rows, m, [w for n, w in self.methods if n == m]) for m in _distinct(self.methods)}
        base = scores.get("sqrt_chi2")
        out = []
        for method, score in scores.items():
            mean, low, high = _interval(score)
            row = {"method, weight from the other seeds": method, "true return": mean, "95 % from": low, "to": high}
            other = (NAN, NAN, NAN) if base is None or method == "sqrt_chi2" else paired_t(base, score)[:3]
            out.append(row | dict(zip(("sqrt_chi2 is above it by", "from", "to "), other)))
        return out

    def figure(self, rows: Rows) -> Figure:
        """True and proxy return over training at the best weights, and the last true return over the weights."""
        page = Figure(figsize=(6.4, 6.2), layout="constrained")
        (true, proxy), below = page.subplots(2, 2)
        grid = below[0].get_gridspec()
        for axis in below:
            axis.remove()
        sweep = page.add_subplot(grid[1, :])
        groups = _distinct(self.methods)
        for method in groups:
            weights = [w for m, w in self.methods if m == method]
            best = max(weights, key=lambda w: statistics.fmean(r["true"] for r in _last(rows, method, w)))
            label = {"none": "no penalty", "stop": f"stop at chi2 {best:g}"}.get(method, f"{method} {best:g}")
            if method != "stop":  # its curves end at different times
                for axis, name in ((true, "true"), (proxy, "proxy")):
                    mine = [r for r in rows if (r["method"], r["weight"]) == (method, best)]
                    times = sorted({r["iteration"] for r in mine})
                    bands = [_interval([r[name] for r in mine if r["iteration"] == t]) for t in times]
                    _band(axis, times, bands, LOOKS.get(method, look(3)), label)
            bands = [_interval([r["true"] for r in _last(rows, method, w)]) for w in weights]
            if method == "none":
                sweep.axhline(bands[0][0], label=label, **LOOKS["none"])
            else:
                _band(sweep, weights, bands, LOOKS.get(method, look(3)), method, marker="o")
        first = statistics.fmean(row["true"] for row in rows if row["iteration"] == 1)
        sweep.axhline(first, color="#8A8A8A", ls=":", label="first rollout")
        sweep.set_xscale("log")
        for axis, x, y in ((true, "rollouts", "true"), (proxy, "rollouts", "proxy"), (sweep, "weight", "last true")):
            axis.set_xlabel("weight of the penalty (stop: estimated chi2 to stop at)" if axis is sweep else x)
            axis.set_ylabel(f"{y} return of an episode")
            axis.grid(color="#E6E6E6")
        for axis in (true, sweep):
            axis.legend(frameon=False, fontsize=8)
        page.suptitle(f"{self.task}: means of {self.seeds} seeds; bands: 95 % (Student's t)", fontsize=10)
        return page


def judged(rows: Rows, method: str, weights: list[float]) -> list[float]:
    """For every seed the last true return at the weight that is best on average over the OTHER seeds: choosing the best
    weight on the same seeds would flatter whoever tried more of them."""
    by = {w: {r["seed"]: r["true"] for r in _last(rows, method, w)} for w in weights}
    seeds = sorted(next(iter(by.values())))
    chosen = [max(weights, key=lambda w: statistics.fmean(by[w][s] for s in seeds if s != seed)) for seed in seeds]
    return [by[w][seed] for w, seed in zip(chosen, seeds)]


def _last(rows: Rows, method: str, weight: float) -> Rows:
    """The last point of every seed's curve."""
    mine: dict[int, dict[str, Any]] = {}
    for row in rows:
        if (row["method"], row["weight"]) == (method, weight):
            mine[row["seed"]] = max(row, mine.get(row["seed"], row), key=lambda r: r["iteration"])
    return list(mine.values())


def _distinct(methods: list[tuple[str, float]]) -> list[str]:
    return list(dict.fromkeys(method for method, _ in methods))


def _interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval; of one run NaN."""
    if len(values) < 2:
        return values[0], NAN, NAN
    mean, low, high = t_interval(values)
    return float(mean), float(low), float(high)


def _band(
    axis: Any, x: list[Any], bands: list[tuple[float, float, float]], line: dict[str, Any], label: str, **style: Any
) -> None:
    mean, low, high = zip(*bands)
    axis.plot(x, mean, label=label, markersize=3, **line | style)
    axis.fill_between(x, low, high, color=line["color"], alpha=0.15, lw=0)


def play_sampled(cell: dict[str, Any]) -> Rows:
    """One run."""
    id, settings = SAMPLED[cell["task"]]
    method, weight = cell["method"], cell["weight"]
    # without a penalty the discriminator still tells how far the policy went
    penalty: dict[str, Any] = {"coef": weight, "stop_at": None, "regulariser": method}
    if method in ("none", "stop"):
        penalty |= {"coef": 0.0, "regulariser": "sqrt_chi2"}
    if not method.endswith("chi2") and method != "kl":
        penalty["stop_at"] = weight if method == "stop" else 1e30
    teacher = reference_policy(cell["task"], settings)
    # every seed has a reward model of its own
    options = {"instance": cell["seed"]} if cell["task"] == "point" else {}
    agent = ORPO(id, seed=cell["seed"], reference=teacher, compile="off", env_kwargs=options, **settings | penalty)
    curve: Rows = []

    def watch(agent: Any) -> bool:
        ends = agent.finished or agent.iteration == cell["iterations"]
        if agent.iteration == 1 or agent.iteration % 2 == 0 or ends:
            s = {k: float(agent.scalars[k]) for k in ("rollout/true_return", "rollout/proxy_return")}
            chi2 = float(agent.scalars["train/occupancy_chi2"])
            row = {"true": s["rollout/true_return"], "proxy": s["rollout/proxy_return"], "chi2": chi2}
            curve.append({"iteration": agent.iteration} | {k: float(f"{x:.5g}") for k, x in row.items()})
        return bool(agent.iteration < cell["iterations"])

    agent.learn(10**9, watch)
    return curve


@torch.no_grad()
def reference_policy(task: str, settings: dict[str, Any]) -> MLPPolicy:
    """The reference as a network without hidden layers: a table of logits, or a linear Gaussian controller."""
    import envs

    env = envs.make(SAMPLED[task][0], 1)
    policy = MLPPolicy(
        env.single_observation_space, env.single_action_space, hidden=(), critic_hidden=settings["critic_hidden"],
        heads={"value": ()},
    )  # fmt: skip
    layer: Any = policy.actor.net[0]
    if task == "tomato":
        layer.weight.copy_(tomato_reference()[1].log().T)
        layer.bias.zero_()
    else:  # 2 (goal - x) + noise / 2
        layer.weight.copy_(-2.0 * torch.eye(2))
        layer.bias.fill_(1.0)
        policy.actor.log_std.fill_(math.log(0.5))
    return policy
